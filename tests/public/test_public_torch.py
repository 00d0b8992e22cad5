"""torch's fake quantization and observers."""

import pytest
import torch
from torch.ao.quantization import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
)

from carsam.quantizers import ActivationQuantizer, QuantizedLayer, simulate
from carsam.quantizers.affine import decode, encode, grid_from_range, qmax
from carsam.quantizers.grouped import GroupedQuantizer
from carsam.quantizers.ranges import PERCENTILE
from carsam.quantizers.rounding import weight_grid
from carsam.quantizers.site import FakeQuantize
from carsam.quantizers.uniform import UniformRecord

BITS = (2, 4, 6, 8)


def quantizer(x, bits, *, always=True):
    found = ActivationQuantizer(bits, always=always)
    found.set_range(x.min().item() / 2, x.max().item() / 3)  # both ends clip
    return found


@pytest.mark.parametrize("bits", BITS)
def test_per_tensor_fake_quantization(bits, activations, same_codes):
    ours = quantizer(activations, bits)
    scale, zero = ours.scale.item(), int(ours.zero_point)
    theirs = torch.fake_quantize_per_tensor_affine(activations, scale, zero, 0, qmax(bits))
    assert 0.001 < ours.clipped(activations).float().mean() < 0.5
    codes = (theirs / scale).round() + zero
    same_codes(ours.encode(activations), codes, activations / scale)
    agree = codes == ours.encode(activations)
    torch.testing.assert_close(ours(activations)[agree], theirs[agree])


@pytest.mark.parametrize("bits", BITS)
def test_weights_per_channel(bits, weight, same_codes):
    """Grid and codes of the rows of a Linear."""
    layer = QuantizedLayer(torch.nn.Linear(96, 24, bias=False), bits, ActivationQuantizer(16))
    with torch.no_grad():
        layer.weight.copy_(weight)
    layer.fit_weight("min-max")

    observer = PerChannelMinMaxObserver(
        ch_axis=0, dtype=torch.quint8, qscheme=torch.per_channel_affine, quant_min=0, quant_max=qmax(bits), eps=1e-8
    )
    observer(weight)
    scale, zero = observer.calculate_qparams()
    torch.testing.assert_close(layer.weight_scale, scale)
    assert torch.equal(layer.weight_zero_point, zero.float())

    theirs = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, 0, qmax(bits))
    codes = (theirs / scale[:, None]).round() + zero[:, None]
    layer.freeze()
    same_codes(layer.codes, codes, weight / scale[:, None])


@pytest.mark.parametrize("kind", ["per tensor", "per channel"])
def test_a_half_rounds_to_even(kind):
    x = torch.tensor([[0.5, 1.5, 2.5, 3.5, -0.5, -1.5, 14.5, 20.0, -20.0]])
    ours = encode(x, torch.tensor(1.0), torch.tensor(4.0), 4) - 4
    if kind == "per tensor":
        theirs = torch.fake_quantize_per_tensor_affine(x, 1.0, 4, 0, 15)
    else:
        theirs = torch.fake_quantize_per_channel_affine(x, torch.ones(1), torch.tensor([4.0]), 0, 0, 15)
    assert ours.tolist() == theirs.tolist() == [[0, 2, 2, 4, 0, -2, 11, 11, -4]]


@pytest.mark.parametrize("bits", BITS)
def test_lsq_gradients(bits, activations):
    """Of the values (straight through, none where clipped) and of the step."""
    ours = quantizer(activations, bits, always=False)
    zero = float(ours.zero_point)
    # No quotient near a half: there the two forward passes may differ by a step, see conftest.
    quotient = activations / ours.scale
    x = activations[((quotient - quotient.floor()) - 0.5).abs() > 1e-4]
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    x1, scale1 = x.clone().requires_grad_(), ours.scale.clone().requires_grad_()
    FakeQuantize.apply(x1, scale1, ours, None).backward(upstream)
    x2, scale2 = x.clone().requires_grad_(), ours.scale.clone().view(1).requires_grad_()
    torch._fake_quantize_learnable_per_tensor_affine(
        x2, scale2, torch.tensor([zero], requires_grad=True), 0, qmax(bits), 1.0
    ).backward(upstream)
    assert torch.equal(x1.grad, x2.grad) and not bool(x1.grad.bool().all())
    # The same sum in another order.
    torch.testing.assert_close(scale1.grad, scale2.grad[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", BITS)
def test_lsqs_gradient_scale(bits, activations):
    """The absolute rate's factor 1/√(numel · qmax)."""
    ours = quantizer(activations, bits, always=False)
    scale = ours.scale.clone().view(1).requires_grad_()
    parameter = ours.learn_scale(relative=False)
    with simulate(activations=True):
        ours(activations).square().sum().backward()
    factor = (activations.numel() * qmax(bits)) ** -0.5
    torch._fake_quantize_learnable_per_tensor_affine(
        activations, scale, torch.tensor([float(ours.zero_point)]), 0, qmax(bits), factor
    ).square().sum().backward()
    torch.testing.assert_close(parameter.grad, scale.grad[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_lsq_gradients_of_groups(bits, activations):
    """A group of one channel each is torch's grid per channel."""
    scale, zero = grid_from_range(activations.amin(0) / 2, activations.amax(0) / 3, bits)
    ours = GroupedQuantizer(bits, groups=96, channels=96)
    ours.set_grid(scale, zero, torch.arange(96))
    quotient = activations / scale
    x = torch.where(((quotient - quotient.floor()) - 0.5).abs() > 1e-4, activations, 0.0)  # as above
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    x1, scale1 = x.clone().requires_grad_(), scale.clone().requires_grad_()
    out = FakeQuantize.apply(x1, scale1, ours, None)
    x2, scale2 = x.clone().requires_grad_(), scale.clone().requires_grad_()
    theirs = torch._fake_quantize_learnable_per_channel_affine(
        x2, scale2, zero.clone().requires_grad_(), 1, 0, qmax(bits), 1.0
    )
    torch.testing.assert_close(out, theirs)
    out.backward(upstream)
    theirs.backward(upstream)
    assert torch.equal(x1.grad, x2.grad) and not bool(x1.grad.bool().all())
    torch.testing.assert_close(scale1.grad, scale2.grad, rtol=1e-3, atol=1e-3)


def record(passes):
    site = UniformRecord()
    for values in passes:
        site.update(values)
    return site


def assert_same_grid(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0].view(()))
    assert ours[1] == theirs[1].item()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shift", [0.0, 30.0, -30.0])  # all of one sign: the grid is widened to hold zero
def test_min_max_observer(bits, shift, activations):
    passes = [part + shift for part in activations.split(16)]
    observer = MinMaxObserver(dtype=torch.quint8, quant_min=0, quant_max=qmax(bits), eps=1e-8)
    for values in passes:
        observer(values)
    assert_same_grid(record(passes).uniform_grid(bits, "min-max"), observer.calculate_qparams())


@pytest.mark.parametrize("bits", BITS)
def test_moving_average_observer(bits, activations):
    """PTQ4SAM's average weighs all passes alike; torch's does so with the constant 1/k at the k-th pass."""
    passes = activations.split(16)
    observer = MovingAverageMinMaxObserver(dtype=torch.quint8, quant_min=0, quant_max=qmax(bits), eps=1e-8)
    for k, values in enumerate(passes, start=1):
        observer.averaging_constant = 1 / k
        observer(values)
    assert_same_grid(record(passes).uniform_grid(bits, "moving-average"), observer.calculate_qparams())


def test_percentile_is_torchs_quantile():
    x = torch.randn(14001, generator=torch.Generator().manual_seed(3)) ** 3
    low, high = (torch.quantile(x, q, interpolation="nearest") for q in (1 - PERCENTILE, PERCENTILE))
    assert low > x.min() and high < x.max()
    site = record([x[:8001], x[8001:]])
    for ours, theirs in zip(site.uniform_grid(4, "percentile"), grid_from_range(low, high, 4)):
        assert torch.equal(ours, theirs)


def test_mse_observer_is_no_worse_than_the_histogram_observer():
    """Both search the range of least squared error; torch's search counts on 256 codes, so it is at 8 bits."""
    x = torch.randn(16000, generator=torch.Generator().manual_seed(4))
    x[::400] *= 20
    observer = HistogramObserver(dtype=torch.quint8, quant_min=0, quant_max=255)
    observer(x)
    scale, zero = observer.calculate_qparams()

    def error(scale, zero):
        return (decode(encode(x, scale, zero, 8), scale, zero) - x).square().sum()

    ours, full = error(*record([x]).uniform_grid(8, "mse")), error(*record([x]).uniform_grid(8, "min-max"))
    assert ours < full
    assert ours <= 1.01 * error(scale, zero)


def test_mse_search_of_weights_is_no_worse_than_scanning_the_step(weight):
    """An exhaustive scan of the share of the range with torch's own quantization, at the search's exponent 2.4."""

    def error(scale, zero):
        found = torch.fake_quantize_per_channel_affine(weight, scale, zero.int(), 0, 0, 15)
        return (found - weight).abs().pow(2.4).sum(1)

    ours = error(*weight_grid(weight, 4))
    low, high = weight.amin(1), weight.amax(1)
    scan = torch.stack([error(*grid_from_range(low * s, high * s, 4)) for s in torch.linspace(0.2, 1, 801).tolist()])
    assert (ours <= 1.02 * scan.amin(0)).all()
    assert (ours < scan[-1]).any()
