"""HLUQ: log-uniform grids."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carsam.calibrate.observers import RangeRecorder
from carsam.quantizers import HybridQuantizer, QuantizedLayer, simulate
from carsam.quantizers.affine import decode, encode, grid_from_range
from carsam.quantizers.hybrid import CODE_SHARES, RANGE_SHARES, round_hybrid, search_hybrid


def hybrid(bits, step=1.0, split=1.7, foot=0.0, log_codes=4):
    quantizer = HybridQuantizer(bits, always=True)
    quantizer.set_grid(torch.tensor(step), torch.tensor(split), torch.tensor(foot), log_codes)
    return quantizer


@pytest.mark.parametrize("log_codes", [2, 4, 8])
@pytest.mark.parametrize("foot", [0.0, -0.17])
def test_zones_meet_and_no_value_is_lost(log_codes, foot):
    split, step = 1.7, 0.9
    quantizer = hybrid(4, step, split, foot, log_codes)
    grid = quantizer.decode(torch.arange(16))
    assert grid[0] == pytest.approx(foot) and bool((grid.diff() > 0).all())
    log, uniform = grid[1 : log_codes + 1] - foot, grid[log_codes + 1 :] - foot
    torch.testing.assert_close(log[1:] / log[:-1], torch.full((log_codes - 1,), 2.0))
    assert log[-1] == pytest.approx(split), "the top of the log zone is the split"
    torch.testing.assert_close(uniform, split + step * torch.arange(1.0, 16 - log_codes))
    # Half a step at most in the uniform zone, half a factor of two in the log zone; large values stay large.
    around = torch.linspace(1.2 + foot, float(grid[-1]), 3001)
    rounded = quantizer(around)
    assert bool((rounded.diff() >= 0).all()) and (rounded - around).abs().max() <= 1.001 * max(
        step / 2, split * (1 - 2**-0.5)
    )


def uniform(x, bits):
    scale, zero = grid_from_range(x.min(), x.max(), bits)
    return decode(encode(x, scale, zero, bits), scale, zero)


@given(st.integers(0, 2**32 - 1))
def test_behind_a_relu_zero_is_kept_and_long_tails_are_served(seed):
    generator = torch.Generator().manual_seed(seed)
    # Half zeros, many small values, few large ones. Not every draw has a long tail; then the zones cost a little.
    x = torch.randn(400, 10, generator=generator).clamp(min=0) * torch.rand(400, 10, generator=generator).pow(6) * 20
    quantizer = HybridQuantizer(4, always=True)
    quantizer.set_grid(*search_hybrid(x, x.min(), x.max(), 4))
    assert (quantizer(x) - x).square().mean() < 1.2 * (uniform(x, 4) - x).square().mean()
    assert quantizer(torch.zeros(1)) == 0


@torch.no_grad()
def test_zones_are_chosen_by_the_error_of_the_layers_output():
    generator = torch.Generator().manual_seed(0)
    layer = QuantizedLayer(torch.nn.Linear(12, 6), 4, HybridQuantizer(4))
    # All weight on the channels that are small: what is large elsewhere must not decide.
    layer.weight.zero_()
    layer.weight[:, :6] = torch.randn(6, 6, generator=generator)
    x = torch.randn(200, 12, generator=generator).relu() * torch.tensor([0.3] * 6 + [3.0] * 6)
    recorder = RangeRecorder([layer])
    with recorder.recording():
        layer(x)
    recorder.apply("moving-average")
    quantizer = layer.input_quantizer
    spread = float(x.max())
    kept = recorder.records[quantizer].rows[0]

    def error(range_share, code_share):
        step = spread * (1 - range_share) / (15 * (1 - code_share))
        rounded = hybrid(4, step, spread * range_share, 0.0, int(16 * code_share))(kept)
        return ((rounded - kept) @ layer.weight.T).square()

    errors = {(r, c): float(error(r, c).sum()) for r in RANGE_SHARES for c in CODE_SHARES}
    of_range, of_codes = min(errors, key=errors.get)
    assert int(quantizer.log_codes) == 16 * of_codes
    torch.testing.assert_close(quantizer.scale[1], torch.tensor(spread * of_range))
    unweighted = search_hybrid(kept, kept.min(), kept.max(), 4, tops=torch.ones(1))
    assert float(unweighted[1]) != pytest.approx(spread * of_range) or unweighted[3] != 16 * of_codes
    # Where ranges shrink, the top is chosen as well, and the error is no larger.
    before = (quantizer.round(kept, quantizer.scale) - kept) @ layer.weight.T
    recorder.apply("mse")
    after = (quantizer.round(kept, quantizer.scale) - kept) @ layer.weight.T
    assert after.square().sum() < 0.5 * before.square().sum()


def test_step_and_split_are_learned_apart():
    """The gradients of both, against those by autograd with rounding straight through."""
    quantizer = hybrid(4, 0.8, 1.1, -0.2, 4)
    x = 12 * torch.rand(500, generator=torch.Generator().manual_seed(0)) - 0.5
    upstream = torch.randn(500, generator=torch.Generator().manual_seed(1))
    scale = quantizer.scale.clone().requires_grad_()
    quantizer.scale = scale.detach()
    step, split = scale
    height = x - step * quantizer.offset
    uniform_codes = 11
    position = (height - split) / step
    code = (position + (position.round() - position).detach()).clamp(0, uniform_codes)
    above = split + code * step
    # In the log zone straight through: x̂ = split · (h/split + constant), and nothing below the foot.
    share = height / split
    rounded = round_hybrid(height.detach(), step.detach(), split.detach(), 4, 4) / split.detach()
    log = split * (share + (rounded - share).detach())
    below = height < -split.detach() * 2**-4
    log = torch.where(below, torch.zeros(()), log)
    expected = torch.where(height > split, above, log) + step * quantizer.offset
    # dx̂/dx = 1 in the log zone, so that the foot's part of the height cancels there.
    torch.testing.assert_close(expected.detach(), quantizer(x), rtol=1e-5, atol=1e-5)
    expected.backward(upstream)
    quantizer.always = False
    learned = quantizer.learn_scale(relative=False)
    factor = (x.numel() * 15) ** -0.5
    with simulate(activations=True):
        quantizer(x).backward(upstream)
    torch.testing.assert_close(learned.grad / factor, scale.grad, rtol=1e-3, atol=1e-3)
