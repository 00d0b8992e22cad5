"""One step, and a beginning for every channel: the arithmetic, learning, the search, and what it is for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from carsam.calibrate.observers import RangeRecorder
from carsam.quantizers import ActivationQuantizer, QuantizedLayer, ShiftedQuantizer, simulate
from carsam.quantizers.shifted import shifted_grid
from carsam.quantizers.site import FakeQuantize

CHANNELS = 12


def apart(seed=0, rows=400):
    """(rows, channels) values of spread one whose channels lie around −6 to 6."""
    x = torch.randn(rows, CHANNELS, generator=torch.Generator().manual_seed(seed))
    return x + torch.linspace(-6, 6, CHANNELS)


def calibrated(quantizer, x, weight=None):
    recorder = RangeRecorder([quantizer])
    with recorder.recording():
        quantizer(x, **({} if weight is None else {"weight": weight}))
    recorder.apply("mse")
    return quantizer


@torch.no_grad()
def relative_error(quantizer, x):
    with simulate(activations=True):
        return ((quantizer(x) - x).square().mean() / x.var(0).mean()).item()


def test_channels_that_lie_apart_lose_a_tenth_of_what_they_lose_with_one_range():
    x = apart()
    one, each = calibrated(ActivationQuantizer(4), x), calibrated(ShiftedQuantizer(4), x)
    # 4 bits around a normal distribution lose a hundredth; over a range three times as wide, nine times as much.
    assert relative_error(each, x) < 0.015 < 0.09 < relative_error(one, x)


def test_it_is_never_much_worse_than_one_range():
    """Channels around zero: their own beginnings are searched on a grid of places, the range in finer steps."""
    x = torch.randn(400, CHANNELS, generator=torch.Generator().manual_seed(1))
    one, each = calibrated(ActivationQuantizer(4), x), calibrated(ShiftedQuantizer(4), x)
    assert relative_error(each, x) < 1.05 * relative_error(one, x)


@torch.no_grad()
@pytest.mark.parametrize("maps", [0, 1])
def test_a_layer_of_single_points_needs_one_integer_product(maps):
    """Σ codes (w − zero) in integers, times both steps, and a bias that is known beforehand."""
    torch.manual_seed(0)
    x = apart()
    source = nn.Conv2d(CHANNELS, 5, 1) if maps else nn.Linear(CHANNELS, 5)
    x = x.view(4, 10, 10, CHANNELS).permute(0, 3, 1, 2) if maps else x
    layer = QuantizedLayer(source, 4, calibrated(ShiftedQuantizer(4, maps=maps), x))
    layer.fit_weight()
    layer.freeze()
    with simulate(weights=True, activations=True):
        found = layer(x)
    grid, weights = (
        layer.input_quantizer,
        layer.codes.long() - layer.weight_zero_point.long().view(-1, *[1] * (layer.codes.dim() - 1)),
    )
    codes = grid.encode(x).double()
    assert codes.min() == 0 and codes.max() == 15
    weights = weights.double().flatten(1)
    product = torch.einsum("nchw,oc->nohw", codes, weights) if maps else codes @ weights.T
    assert torch.equal(product, product.round())
    steps = layer.weight_scale.double()
    bias = layer.bias.double() + weights @ grid.shift.double() * steps
    along = (slice(None), None, None) if maps else slice(None)
    expected = product * (grid.scale.double() * steps)[along] + bias[along]
    np.testing.assert_allclose(found.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grid.decode(grid.encode(x)), grid.round(x, grid.step()))
    assert grid.spec() == {"grid": "shifted", "bits": 4, "channels": CHANNELS, "maps": maps}


def test_gradients_are_those_of_a_grid_about_its_middle():
    x = (1.5 * apart(1)).requires_grad_()
    quantizer = calibrated(ShiftedQuantizer(4), apart())
    scale = quantizer.scale.clone().requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    FakeQuantize.apply(x, scale, quantizer, None).backward(grad)

    middle = (quantizer.shift + 7.5 * quantizer.scale).double()
    values, step = x.detach().double().requires_grad_(), quantizer.scale.double().requires_grad_()
    steps = (values - middle) / step + 7.5
    straight = steps + (steps.round() - steps).detach()
    ((straight.clamp(0, 15) - 7.5) * step + middle).backward(grad.double())
    # Both clip what rounds beyond the first or last code.
    torch.testing.assert_close(x.grad.double(), values.grad)
    torch.testing.assert_close(scale.grad.double(), step.grad, rtol=1e-4, atol=1e-4)
    assert bool(quantizer.clipped(x).any()) and not bool(quantizer.clipped(x).all())


@pytest.mark.parametrize("maps", [0, 1])
def test_a_learned_step_leaves_the_middle(maps):
    x, other = apart(), 2 * apart(1)
    if maps:
        x, other = (each.reshape(2, -1, 5, CHANNELS).permute(0, 3, 1, 2) for each in (x, other))
    quantizer = calibrated(ShiftedQuantizer(4, maps=maps), x)
    before, middle = quantizer.scale.clone(), quantizer.origin().clone()
    parameter = quantizer.learn_scale()
    with simulate(activations=True):
        quantizer(other).square().sum().backward()
        assert parameter.grad.shape == () and float(parameter.grad) != 0
        with torch.no_grad():
            parameter.add_(0.25)
        learning = quantizer(other).detach()
    quantizer.settle()
    assert float((quantizer.scale / before).log()) == pytest.approx(0.25, rel=1e-4)
    torch.testing.assert_close(quantizer.origin(), middle, rtol=1e-5, atol=1e-5)
    # What was learned is what is packed, but for values that lie between two codes to float32's last bits.
    settled = quantizer.decode(quantizer.encode(other))
    assert float(((settled - learning).abs() > 1e-4).double().mean()) < 1e-3


def test_channels_that_the_layer_reads_loudly_decide_the_step():
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 8.0])
    quiet, loud = torch.tensor([[1.0, 1e-4]]), torch.tensor([[1e-4, 1.0]])
    steps = [calibrated(ShiftedQuantizer(4), x, weight).scale.item() for weight in (quiet, loud)]
    assert 4 < steps[1] / steps[0] < 16  # as far apart as the channels' spreads


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    seed=st.integers(0, 10**6),
    size=st.floats(1e-6, 1e6),
    constant=st.booleans(),
)
def test_the_grid_spans_no_more_than_it_must_and_is_finite(bits, seed, size, constant):
    generator = torch.Generator().manual_seed(seed)
    x = size * (torch.randn(64, 3, generator=generator) + 3 * torch.randn(3, generator=generator))
    if constant:
        x[:, 1] = x[0, 1]
    low, high = x.aminmax(dim=0)
    step, shift = shifted_grid(x, low, high, torch.ones(3), bits)
    assert torch.isfinite(step) and step > 0 and bool(torch.isfinite(shift).all())
    levels = 2**bits - 1
    rounded = ((x - shift) / step).round().clamp(0, levels) * step + shift
    # No worse than the grids that min-max gives each channel with the step of the widest.
    widest = (high - low).max() / levels
    plain = ((x - low) / widest).round().clamp(0, levels) * widest + low
    assert (rounded - x).square().sum() <= 1.1 * (plain - x).square().sum() + 1e-9 * size**2
    quantizer = ShiftedQuantizer(bits)
    quantizer.set_grid(step, shift)
    assert quantizer.is_calibrated and quantizer.fault() == ""


def test_a_file_without_a_usable_shift_is_told_from_one_with():
    quantizer = ShiftedQuantizer(4)
    assert quantizer.fault() == "no usable scale" and not quantizer.is_calibrated
    quantizer.set_grid(torch.tensor(0.5), torch.tensor([0.0, float("nan")]))
    assert quantizer.fault() == "no usable shift"
    assert ShiftedQuantizer(16).fault() == "" and ShiftedQuantizer(16).spec() == {"grid": "shifted", "bits": 16}
