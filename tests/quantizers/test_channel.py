"""A step for every channel of a depthwise convolution's input: the arithmetic, learning, and what it is for."""

import numpy as np
import pytest
import torch
from torch import nn

from carsam.calibrate.observers import RangeRecorder
from carsam.quantizers import ActivationQuantizer, ChannelQuantizer, QuantizedLayer, simulate
from carsam.quantizers.site import FakeQuantize

CHANNELS = 6


def maps(seed=0):
    """(2, channels, 5, 7) maps whose channels differ by a factor of a hundred."""
    x = torch.randn(2, CHANNELS, 5, 7, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-1, 1, CHANNELS)[:, None, None]


def calibrated(quantizer, x, observer="mse"):
    recorder = RangeRecorder([quantizer])
    with recorder.recording():
        quantizer(x)
    recorder.apply(observer)
    return quantizer


def depthwise():
    torch.manual_seed(0)
    conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
    with torch.no_grad():  # what is small at the input counts as much as what is large
        conv.weight.mul_(torch.logspace(1, -1, CHANNELS)[:, None, None, None])
    return conv


@pytest.mark.parametrize("observer", ["mse", "min-max", "percentile", "moving-average"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_channel_of_a_map_is_a_tensor_of_its_own(observer, layout):
    x = maps().contiguous(memory_format=layout)
    quantizer = calibrated(ChannelQuantizer(4, maps=1), x, observer)
    with simulate(activations=True):
        found = quantizer(x)
        for channel in range(CHANNELS):
            alone = ActivationQuantizer(4)
            alone.set_grid(quantizer.scale[channel], quantizer.zero_point[channel])
            torch.testing.assert_close(found[:, channel], alone(x[:, channel]))
    torch.testing.assert_close(quantizer.decode(quantizer.encode(x)), found)
    assert quantizer.spec() == {"grid": "channel", "bits": 4, "channels": CHANNELS, "maps": 1}


@torch.no_grad()
def test_a_depthwise_convolution_needs_one_factor_for_each_output():
    """Σ (codes − zero)(w − zero) in integers, times the steps of the channel: no other arithmetic than per tensor."""
    x, conv = maps(), depthwise()
    layer = QuantizedLayer(conv, 4, calibrated(ChannelQuantizer(4, maps=1), x))
    layer.fit_weight()
    layer.freeze()
    with simulate(weights=True, activations=True):
        found = layer(x)
    grid = layer.input_quantizer
    inputs = grid.encode(x).long() - grid.zero_point.long()[:, None, None]
    weights = layer.codes.long() - layer.weight_zero_point.long()[:, None, None, None]
    # Integers of this size are exact in float64.
    sums = nn.functional.conv2d(inputs.double(), weights.double(), padding=1, groups=CHANNELS)
    assert torch.equal(sums, sums.round())
    factor = grid.scale.double() * layer.weight_scale.double()
    expected = sums * factor[:, None, None] + layer.bias.double()[:, None, None]
    np.testing.assert_allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_channels_of_different_size_lose_less_than_with_one_step():
    x, conv = maps(), depthwise()
    target, errors = conv(x), []
    for quantizer in (ActivationQuantizer(4), ChannelQuantizer(4, maps=1)):
        calibrated(quantizer, x)
        with simulate(activations=True):
            rounded = quantizer(x)
        errors.append((conv(rounded) - target).square().mean().item())
    # 4 bits around each channel: a step of a sixth of its spread. One step for all loses the small ones whole.
    assert errors[1] < 0.1 * errors[0]
    assert errors[1] < 0.03 * target.var().item()


@torch.no_grad()
def test_ranges_come_from_all_columns_of_a_map():
    """A map whose first column is all but empty, as images padded at a side are."""
    x = torch.randn(1, 64, 256, 256, generator=torch.Generator().manual_seed(0))
    x[..., 0] *= 0.01
    grid = calibrated(ChannelQuantizer(4, maps=1), x)
    whole = calibrated(ActivationQuantizer(4), x[:, :1, :, 1:])
    # Both searches take steps of a tenth; the first column alone would ask for a hundredth.
    assert grid.scale[0].item() == pytest.approx(whole.scale.item(), rel=0.2)


def test_gradients_of_the_steps_are_those_of_the_channels_alone():
    x = (1.5 * maps(1)).requires_grad_()
    quantizer = calibrated(ChannelQuantizer(4, maps=1), maps())
    scale = quantizer.step_along(x).detach().clone().requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    FakeQuantize.apply(x, scale, quantizer, None).backward(grad)
    inside = ~quantizer.clipped(x)
    torch.testing.assert_close(x.grad, grad * inside)
    for channel in range(CHANNELS):
        part, alone = x[:, channel].detach(), ActivationQuantizer(4)
        alone.set_grid(quantizer.scale[channel], quantizer.zero_point[channel])
        step = alone.scale.clone().requires_grad_()
        FakeQuantize.apply(part, step, alone, None).backward(grad[:, channel])
        torch.testing.assert_close(scale.grad[channel, 0, 0], step.grad, rtol=1e-3, atol=1e-4)


def test_learned_steps_move_a_channel_each():
    quantizer = calibrated(ChannelQuantizer(4, maps=1), maps())
    before = quantizer.scale.clone()
    parameter = quantizer.learn_scale()
    with simulate(activations=True):
        quantizer(maps(1)).square().sum().backward()
    assert parameter.grad.shape == (CHANNELS,) and bool((parameter.grad != 0).any())
    with torch.no_grad():
        parameter[2] += 0.5
    quantizer.settle()
    expected = torch.zeros(CHANNELS)
    expected[2] = 0.5
    torch.testing.assert_close((quantizer.scale / before).log(), expected, rtol=1e-5, atol=1e-5)
