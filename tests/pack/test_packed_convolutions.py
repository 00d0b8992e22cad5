"""Convolutions, grouped and depthwise ones among them, from float weights to bytes and back."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from carsam.pack.bits import packed_size
from carsam.pack.layers import PackedLayer
from carsam.quantizers import ActivationQuantizer, QuantizedLayer, simulate
from carsam.quantizers.affine import decode, encode
from carsam.quantizers.rounding import weight_grid

CONVOLUTIONS = {
    "plain": {"in_channels": 6, "out_channels": 4, "kernel_size": 3, "padding": 1},
    "depthwise": {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 6},
    "depthwise, strided": {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "stride": 2, "groups": 6},
    "depthwise, two outputs a channel": {"in_channels": 5, "out_channels": 10, "kernel_size": (1, 3), "groups": 5},
    "grouped, dilated": {"in_channels": 6, "out_channels": 9, "kernel_size": 3, "dilation": 2, "groups": 3},
}


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def bias(request):
    return request.param


@pytest.fixture(params=CONVOLUTIONS)
def conv(request, bias):
    torch.manual_seed(0)
    layer = nn.Conv2d(**CONVOLUTIONS[request.param], bias=bias)
    with torch.no_grad():  # channels of very different size: one grid for all would lose the small ones
        layer.weight.mul_(torch.logspace(-2, 1, layer.out_channels)[:, None, None, None])
    return layer


def inputs(layer):
    return torch.randn(2, layer.in_channels, 9, 9, generator=torch.Generator().manual_seed(1))


def input_quantizer(x, bits=4):
    quantizer = ActivationQuantizer(bits)
    quantizer.set_range(x.min().item(), x.max().item())
    return quantizer


def frozen(layer, x, bits):
    """The layer with integer weights, and what it computes while simulated."""
    quantized = QuantizedLayer(layer, bits, input_quantizer(x))
    quantized.fit_weight()
    with torch.no_grad(), simulate(weights=True, activations=True):
        before = quantized(x)
        quantized.freeze()
        torch.testing.assert_close(quantized(x), before)
    return quantized, before


@torch.no_grad()
def test_in_floating_point_nothing_changes(conv):
    x = inputs(conv)
    assert torch.equal(QuantizedLayer(conv, 4, ActivationQuantizer(4))(x), conv(x))


@torch.no_grad()
def test_every_output_channel_has_its_own_grid(conv):
    x = inputs(conv)
    weight = conv.weight.clone()
    layer, _ = frozen(conv, x, 4)
    for channel, row in enumerate(weight):
        scale, zero = weight_grid(row[None], 4)
        torch.testing.assert_close(layer.weight_scale[channel : channel + 1], scale)
        torch.testing.assert_close(layer.weight[channel], decode(encode(row, scale, zero, 4), scale, zero))


@pytest.mark.parametrize("bits", [3, 4, 8])
@torch.no_grad()
def test_packed_saved_and_loaded_it_computes_what_was_simulated(conv, bits, tmp_path):
    x = inputs(conv)
    empty_place = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
    )
    layer, simulated = frozen(conv, x, bits)
    layer.input_quantizer.always = True
    packed = PackedLayer.from_quantized(layer)
    assert packed.weight.shape == (packed_size(conv.weight.numel(), bits),) and packed.weight.dtype == torch.uint8
    assert torch.equal(packed.integer_weight(), layer.codes)
    torch.testing.assert_close(packed(x), simulated)

    save_file(packed.state_dict(), tmp_path / "layer.safetensors")
    loaded = PackedLayer.like(empty_place, bits, ActivationQuantizer(4, always=True))
    loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert loaded.conv == packed.conv and loaded.conv["groups"] == conv.groups
    assert torch.equal(loaded(x), packed(x))


@torch.no_grad()
def test_depthwise_is_one_convolution_a_channel():
    torch.manual_seed(2)
    layer = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    x = inputs(layer)
    packed = PackedLayer.from_quantized(frozen(layer, x, 4)[0])
    packed.input_quantizer.always = True
    weight, rounded = packed.dequantized_weight(), packed.input_quantizer(x)
    alone = [
        F.conv2d(rounded[:, c : c + 1], weight[c : c + 1], packed.bias[c : c + 1], padding=1).squeeze(1)
        for c in range(4)
    ]
    torch.testing.assert_close(packed(x), torch.stack(alone, 1))


def test_learned_rounding_reaches_every_group():
    torch.manual_seed(3)
    layer = QuantizedLayer(nn.Conv2d(6, 6, 3, groups=6), 4, ActivationQuantizer(16))
    layer.fit_weight()
    alpha = layer.learn_rounding()
    with simulate(weights=True):
        layer(torch.randn(1, 6, 5, 5)).square().sum().backward()
    assert alpha.shape == (6, 1, 3, 3)
    assert bool((alpha.grad.abs().amax((1, 2, 3)) > 0).all())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.Conv2d(2, 2, 3, padding="same", groups=2), "padding='same'"),
        (lambda: nn.Conv2d(2, 2, 3, padding="valid"), "padding='valid'"),
        (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "zero-padded"),
        (lambda: nn.ConvTranspose2d(2, 2, 3), "not ConvTranspose2d"),
    ],
)
def test_what_cannot_be_quantized_is_refused_with_its_reason(layer, message):
    with pytest.raises(TypeError, match=message):
        QuantizedLayer(layer(), 4, ActivationQuantizer(4))
    with pytest.raises(TypeError, match=message):
        PackedLayer.like(layer(), 4, ActivationQuantizer(4))
