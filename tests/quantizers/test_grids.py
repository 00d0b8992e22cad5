"""The grids that are not uniform per tensor: log2 (AGQ), log-uniform (HLUQ), per group of channels (CAG)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carsam.calibrate.observers import RangeRecorder
from carsam.quantizers import GroupedQuantizer, HybridQuantizer, Log2Softmax, SiteQuantizer, simulate
from carsam.quantizers.affine import decode, encode, grid_from_range
from carsam.quantizers.grouped import group_channels
from carsam.quantizers.hybrid import round_hybrid, search_hybrid, zone_size
from carsam.quantizers.site import FakeQuantize
from carsam.quantizers.softmax_log2 import round_log2

CHANNELS = 6


def log2(bits, tau=2, scale=0.8):
    quantizer = Log2Softmax(bits, always=True)
    quantizer.set_grid(torch.tensor(scale), tau)
    return quantizer


def hybrid(bits, scale=0.25, split=0.8, offset=-0.6):
    quantizer = HybridQuantizer(bits, always=True)
    quantizer.set_grid(torch.tensor(scale), torch.tensor(split), torch.tensor(offset))
    return quantizer


def grouped(bits):
    quantizer = GroupedQuantizer(bits, always=True, groups=3)
    quantizer.set_grid(torch.tensor([0.1, 0.5, 2.0]), torch.tensor([0, 3, 1]), torch.tensor([0, 1, 2, 1, 0, 2]))
    return quantizer


GRIDS = {"log2": log2, "log-uniform": hybrid, "grouped": grouped}


def values(seed, *, positive=False):
    x = 3 * torch.randn(64, CHANNELS, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(x, dim=-1) if positive else x


@pytest.mark.parametrize("grid", GRIDS)
@given(bits=st.integers(2, 8), seed=st.integers(0, 2**32 - 1))
def test_codes_round_trip_and_stand_for_what_the_model_computes_with(grid, bits, seed):
    quantizer = GRIDS[grid](bits)
    x = values(seed, positive=grid == "log2")
    codes = quantizer.encode(x)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 2**bits
    rounded = SiteQuantizer.forward(quantizer, x)
    # Written in other operations than the fast path: equal up to rounding of single precision.
    torch.testing.assert_close(quantizer.decode(codes), rounded, rtol=1e-5, atol=1e-6)
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)


@pytest.mark.parametrize("grid", ["log-uniform", "grouped"])
@given(bits=st.integers(3, 8), seed=st.integers(0, 2**32 - 1))
def test_codes_are_in_the_order_of_the_values(grid, bits, seed):
    quantizer = GRIDS[grid](bits)
    x = values(seed).sort(dim=0).values
    assert bool((quantizer.encode(x).int().diff(dim=0) >= 0).all())
    assert bool((quantizer(x).diff(dim=0) >= 0).all())


@pytest.mark.parametrize("tau", Log2Softmax.TAUS)
@pytest.mark.parametrize("bits", [3, 4, 6])  # at 8 bits the lowest codes are below single precision
def test_agq_has_tau_codes_to_a_factor_of_two(tau, bits):
    grid = log2(bits, tau).decode(torch.arange(2**bits))
    assert grid[0] == pytest.approx(0.8)
    torch.testing.assert_close(grid[:-1] / grid[1:], torch.full((2**bits - 1,), 2 ** (1 / tau)))
    # Rounded in the logarithm: the error is at most half a code's factor.
    x = torch.linspace(float(grid[-1]), 0.8, 1000)
    ratio = round_log2(x, torch.tensor(0.8), tau, bits) / x
    assert ratio.max() <= 2 ** (0.5 / tau) * 1.0001 and ratio.min() >= 2 ** (-0.5 / tau) * 0.9999


@torch.no_grad()
def test_agq_takes_the_granularity_with_the_least_error_of_pv():
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 32, 8, generator=generator)
    chosen = {}
    for name, spread in (("sharp", 6.0), ("broad", 0.3)):
        scores = spread * torch.randn(2, 16, 32, generator=generator)
        quantizer = Log2Softmax(4)
        recorder = RangeRecorder([quantizer])
        with recorder.recording():
            quantizer(scores, value=value)
        recorder.apply("mse")
        probs = torch.softmax(scores, -1)
        assert quantizer.scale == pytest.approx(probs.max().item())
        errors = {
            tau: ((round_log2(probs, quantizer.scale, tau, 4) - probs) @ value).square().sum().item()
            for tau in quantizer.TAUS
        }
        assert int(quantizer.tau) == min(errors, key=errors.get)
        chosen[name] = int(quantizer.tau)
    assert chosen["sharp"] < chosen["broad"], "a broad attention needs fine steps near the top, a sharp one reach"


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_hluqs_zones_meet(bits):
    count, width = zone_size(bits), torch.tensor(1.7)
    quantizer = hybrid(bits, scale=1.0, split=1.7, offset=0.0)
    grid = quantizer.decode(torch.arange(2**bits))
    log, uniform = grid[:count], grid[count:]
    assert grid[0] == 0 and bool((grid.diff() > 0).all())
    torch.testing.assert_close(log[2:] / log[1:-1], torch.full((count - 2,), 2.0))
    assert log[-1] == width, "the top of the log zone is the split"
    torch.testing.assert_close(uniform, width + torch.arange(1, count + 1), msg="uniform steps start at the split")
    # Across the split nothing jumps by more than the neighbouring steps.
    around = torch.linspace(1.0, 3.0, 2001)
    rounded = round_hybrid(around.clone(), width, count)
    assert bool((rounded.diff() >= 0).all()) and (rounded - around).abs().max() <= 0.5001


def uniform_error(x, bits):
    scale, zero = grid_from_range(x.min(), x.max(), bits)
    return (decode(encode(x, scale, zero, bits), scale, zero) - x).square().mean()


@given(st.integers(0, 2**32 - 1))
def test_hluq_behind_a_relu_keeps_zero_and_serves_long_tails(seed):
    generator = torch.Generator().manual_seed(seed)
    # Half zeros, many small values, few large ones. Not every draw has a long tail; then the zones cost a little.
    x = torch.randn(4000, generator=generator).clamp(min=0) * torch.rand(4000, generator=generator).pow(6) * 20
    quantizer = HybridQuantizer(4, always=True)
    quantizer.set_grid(*search_hybrid(x, x.min(), x.max(), 4))
    assert (quantizer(x) - x).square().mean() < 1.2 * uniform_error(x, 4)
    assert quantizer(torch.zeros(1)) == 0


def test_hluq_beats_a_uniform_grid_behind_gelu():
    x = torch.nn.functional.gelu(2 * torch.randn(20000, generator=torch.Generator().manual_seed(0)))
    quantizer = HybridQuantizer(4, always=True)
    quantizer.set_grid(*search_hybrid(x, x.min(), x.max(), 4))
    assert (quantizer(x) - x).square().mean() < 0.8 * uniform_error(x, 4)


def test_cag_separates_channels_by_range():
    wide = torch.tensor([1.0, 1.1, 0.9, 40.0, 41.0, 10.0, 9.5, 0.1])
    group = group_channels(-wide, wide, 4)
    partition = {frozenset((group == g).nonzero().flatten().tolist()) for g in group.unique()}
    assert {frozenset({3, 4}), frozenset({5, 6})} <= partition
    # Ranges of equal width in other places are other ranges.
    apart = group_channels(torch.tensor([0.0, 0.1, 5.0, 5.1]), torch.tensor([1.0, 1.1, 6.0, 6.1]), 2)
    assert apart[0] == apart[1] != apart[2] == apart[3]


@given(st.data())
def test_cag_ends_where_k_means_rests(data):
    """Every channel is in the nearest cluster, whose centre is the mean of its channels."""
    channels, groups = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    high = torch.randn(channels, generator=generator).exp()
    low = -high * torch.rand(channels, generator=generator)
    group = group_channels(low, high, groups)
    assert (
        group.shape == (channels,) and group.dtype == torch.int64 and 0 <= int(group.min()) <= int(group.max()) < groups
    )
    points, used = torch.stack([low, high], 1).double(), group.unique()
    centres = torch.stack([points[group == index].mean(0) for index in used])
    assert torch.equal(used[torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)], group)


def test_cag_without_enough_channels_leaves_groups_empty():
    one = torch.ones(1)
    assert int(group_channels(-one, one, 4)) in range(4)
    alike = torch.ones(9)
    assert len(group_channels(-alike, alike, 4).unique()) == 1
    assert len(group_channels(torch.zeros(5), torch.zeros(5), 4).unique()) == 1


@torch.no_grad()
def test_cag_beats_one_grid_where_channels_differ_and_keeps_its_channels_in_the_spec():
    x = torch.randn(500, CHANNELS, generator=torch.Generator().manual_seed(1)) * torch.tensor([1, 1, 1, 20, 20, 0.1])
    quantizer = GroupedQuantizer(4, groups=3)
    recorder = RangeRecorder([quantizer])
    with recorder.recording():
        quantizer(x)
    recorder.apply("mse")
    assert quantizer.spec() == {"grid": "grouped", "bits": 4, "groups": 3, "channels": CHANNELS}
    with simulate(activations=True):
        relative = (quantizer(x) - x).square().mean(0) / x.var(0)
    assert relative.max() < 0.03, "every channel has a grid of its own size"


@pytest.mark.parametrize("grid", GRIDS)
def test_scale_gradient_is_that_of_lsq(grid):
    quantizer = GRIDS[grid](4)
    x = values(3, positive=grid == "log2").requires_grad_()
    factor = torch.tensor(1.0, requires_grad=True)
    out = FakeQuantize.apply(x, quantizer.step_along(x) * factor, quantizer, None)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    out.backward(grad)
    inside = ~quantizer.clipped(x)
    assert 0 < int(inside.sum()) < x.numel() or grid == "log2"
    torch.testing.assert_close(x.grad, grad * inside)
    # d x̂ / d log s: x̂ − x inside the grid, x̂ where clipped.
    expected = (grad * (out - x * inside)).sum()
    torch.testing.assert_close(factor.grad, expected, rtol=1e-4, atol=1e-4)
