"""The uniform grid, its straight-through gradients, and the simulation state."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carsam.quantizers import ActivationQuantizer, RowMaximumSoftmax, UniformSoftmax, current, simulate
from carsam.quantizers.affine import decode, encode, grid_from_range, qmax
from carsam.quantizers.simulation import keep_mask
from carsam.quantizers.site import FakeQuantize

ranges = st.tuples(st.floats(-50, 50), st.floats(-50, 50)).map(sorted)


@given(ranges, st.integers(2, 8))
def test_grid_holds_zero_exactly_and_errs_at_most_half_a_step_inside(ends, bits):
    low, high = (torch.tensor(float(v)) for v in ends)
    scale, zero = grid_from_range(low, high, bits)
    assert 0 <= zero <= qmax(bits) and zero == zero.round()
    assert decode(encode(torch.zeros(1), scale, zero, bits), scale, zero) == 0
    # The zero point is rounded, so the grid may miss an end of the range by up to half a step.
    x = torch.linspace(float(low.clamp(max=0)) + float(scale) / 2, float(high.clamp(min=0)) - float(scale) / 2, 101)
    x = x[(x >= low.clamp(max=0)) & (x <= high.clamp(min=0))]
    error = (decode(encode(x, scale, zero, bits), scale, zero) - x).abs()
    assert error.numel() == 0 or error.max() <= float(scale) * (1 + 1e-4)


@given(st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_quantizing_twice_changes_nothing(bits, seed):
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    quantizer = ActivationQuantizer(bits, always=True)
    quantizer.set_range(x.min().item(), x.max().item())
    once = quantizer(x)
    assert torch.equal(quantizer(once), once)
    codes = torch.round(once / quantizer.scale) + quantizer.zero_point
    assert codes.min() >= 0 and codes.max() <= qmax(bits)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_composed_operations(masked):
    generator = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(2000, generator=generator)).requires_grad_()
    scale = torch.tensor(0.3, requires_grad=True)
    quantizer = ActivationQuantizer(4)
    quantizer.set_grid(scale.detach(), torch.tensor(5))
    mask = torch.rand(2000, generator=generator) > 0.5 if masked else None
    grad = torch.randn(2000, generator=generator)
    out = FakeQuantize.apply(x, scale, quantizer, mask)
    out.backward(grad)

    x2, scale2 = x.detach().clone().requires_grad_(), scale.detach().clone().requires_grad_()
    steps = x2 / scale2
    expected = (steps + (steps.round() - steps).detach()).clamp(-5, 10) * scale2
    if masked:
        expected = torch.where(mask, expected, x2)
    expected.backward(grad)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(scale.grad, scale2.grad, rtol=1e-4, atol=1e-4)  # two sums in other orders


def test_simulation_is_off_by_default_and_restored_after_an_error():
    assert not current().weights and not current().activations
    with pytest.raises(KeyError), simulate(activations=True, drop=0.5):
        assert current().drop == 0.5
        raise KeyError
    assert not current().activations and current().drop == 0.0


def test_a_quantizer_without_range_names_calibration():
    with simulate(activations=True), pytest.raises(RuntimeError, match="run calibration first"):
        ActivationQuantizer(4)(torch.ones(2))


@pytest.mark.parametrize("drop", [0.5, 0.25])
def test_keep_mask_has_the_right_rate(drop):
    torch.manual_seed(0)
    kept = keep_mask(torch.Size((301, 333)), drop, torch.device("cpu")).float().mean().item()
    assert kept == pytest.approx(1 - drop, abs=0.01)  # five standard deviations


def test_learned_scale_settles_into_the_buffer():
    quantizer = ActivationQuantizer(4)
    quantizer.set_range(-1.0, 2.0)
    before = quantizer.scale.clone()
    for relative in (True, False):
        parameter = quantizer.learn_scale(relative=relative)
        torch.testing.assert_close(quantizer.step(), before)
        with torch.no_grad():
            parameter.add_(0.01)
        quantizer.settle()
        assert quantizer.learned is None and quantizer.scale > before
        quantizer.set_range(-1.0, 2.0)


@pytest.mark.parametrize("kind", [UniformSoftmax, RowMaximumSoftmax])
def test_softmax_grids(kind):
    scores = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    softmax = kind(4, always=True)
    if kind is UniformSoftmax:
        softmax.quantizer.set_range(0.0, 0.2)
    probs = softmax(scores)
    if kind is RowMaximumSoftmax:
        torch.testing.assert_close(probs.sum(-1), torch.ones(3, 5))
        levels = probs / probs.amax(-1, keepdim=True) * 15
    else:
        levels = probs / softmax.quantizer.scale
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    torch.testing.assert_close(kind(16, always=True)(scores), torch.softmax(scores, -1))


def test_row_maximum_keeps_a_broad_row_that_a_uniform_grid_loses():
    scores = torch.stack([torch.zeros(256), torch.nn.functional.one_hot(torch.tensor(3), 256) * 20.0])
    uniform = UniformSoftmax(4, always=True)
    uniform.quantizer.set_range(0.0, 1.0)
    assert uniform(scores)[0].sum() == 0
    torch.testing.assert_close(RowMaximumSoftmax(4, always=True)(scores), torch.softmax(scores, -1), atol=1e-3, rtol=0)
