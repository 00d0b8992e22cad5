"""Single layers: ONNX Runtime against the integer arithmetic that the simulation stands for."""

import numpy as np
import pytest
import torch
from torch import nn

from carsam.errors import ConfigError
from carsam.export.graph import Stretch
from carsam.export.grids import decoded
from carsam.export.layers import lower_layer
from carsam.export.weights import unpacked
from carsam.pack.bits import pack_codes
from carsam.pack.layers import PackedLayer
from carsam.quantizers import (
    ActivationQuantizer,
    ChannelQuantizer,
    GroupedQuantizer,
    HybridQuantizer,
    ShiftedQuantizer,
    SiteQuantizer,
)

GENERATOR = torch.Generator().manual_seed(0)


def uniform(bits, scale=0.25, zero=3):
    quantizer = ActivationQuantizer(bits, always=True)
    quantizer.set_grid(torch.tensor(scale), torch.tensor(zero))
    return quantizer


def grouped(bits, channels):
    quantizer = GroupedQuantizer(bits, always=True, channels=channels)
    group = torch.randint(4, (channels,), generator=GENERATOR)
    quantizer.set_grid(torch.tensor([0.25, 0.5, 0.125, 1.0]), torch.tensor([3, 0, 2, 1]), group)
    return quantizer


def shifted(bits, channels, maps=0):
    quantizer = ShiftedQuantizer(bits, always=True, channels=channels, maps=maps)
    quantizer.set_grid(torch.tensor(0.25), torch.randint(-40, 40, (channels,), generator=GENERATOR) / 8)
    return quantizer


def hybrid(bits, log_codes):
    quantizer = HybridQuantizer(bits, always=True)
    quantizer.set_grid(torch.tensor(0.5), torch.tensor(1.0), torch.tensor(-0.25), log_codes)
    return quantizer


def packed(layer, bits, quantizer, *, powers=True):
    """A packed layer with random codes; scales that are powers of two make every float of it exact."""
    result = PackedLayer.like(layer, bits, quantizer)
    count = layer.weight.numel()
    result.weight.copy_(pack_codes(torch.randint(2**bits, (count,), generator=GENERATOR), bits))
    out = layer.weight.shape[0]
    exponents = torch.randint(-3, 1, (out,), generator=GENERATOR).float()
    scale = torch.exp2(exponents) if powers else torch.rand(out, generator=GENERATOR) + 0.1
    result.weight_scale.copy_(scale)
    result.weight_zero_point.copy_(torch.randint(2**bits, (out,), generator=GENERATOR))
    if result.bias is not None:
        result.bias.copy_(torch.randint(-8, 8, (out,), generator=GENERATOR))
    return result


def lowered(layer, x, run_stretch):
    """What ONNX Runtime gives for a layer, and how it was lowered."""
    graph = Stretch("site")
    with torch.no_grad():
        expected = layer(x)
    facts = lower_layer(graph, layer, "x", "y", (x.shape, expected.shape))
    (result,) = run_stretch(graph, {"x": x.numpy()}, ["y"])
    return torch.from_numpy(result), expected, facts


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [8, 13])
def test_codes_come_out_of_the_file_as_they_went_in(bits, count, run_stretch):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (count, 3)).astype(np.uint8)
    graph = Stretch("site")
    name = unpacked(graph, codes, bits)
    (found,) = run_stretch(graph, {}, [name])
    np.testing.assert_array_equal(found, codes)
    stored = sum(
        len(tensor.raw_data) for tensor in graph.constants if tensor.name.split("/")[1][:4] in ("pack", "code")
    )
    assert stored <= -(-codes.size * bits // 8) + 3


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_is_bit_for_bit(bits, bias, run_stretch):
    layer = packed(nn.Linear(33, 20, bias=bias), bits, uniform(bits))
    x = torch.randn(2, 5, 33, generator=GENERATOR) * 4
    result, expected, facts = lowered(layer, x, run_stretch)
    assert facts.integer_macs == facts.macs == 2 * 5 * 33 * 20
    # Powers of two: the simulation's floats are exact, so equal floats are equal integers.
    assert torch.equal(result, expected)


def test_a_linear_with_any_scales_has_the_same_integers(run_stretch):
    layer = packed(nn.Linear(64, 32), 4, uniform(4, scale=0.173, zero=6), powers=False)
    x = torch.randn(50, 64, generator=GENERATOR)
    result, _, _ = lowered(layer, x, run_stretch)
    codes = layer.input_quantizer.encode(x).long() - 6
    weights = layer.integer_weight().long() - layer.weight_zero_point.long()[:, None]
    sums = (codes @ weights.T).double()
    back = (result.double() - layer.bias.double()) / (layer.weight_scale.double() * float(layer.input_quantizer.scale))
    # Whole numbers up to float32's rounding of sums in the hundreds and of the bias.
    assert torch.equal(back.round(), sums) and (back - sums).abs().max() < 1e-2


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "dilation": 2},
        {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0)},
    ],
    ids=str,
)
def test_a_convolution_is_bit_for_bit(settings, run_stretch):
    layer = packed(nn.Conv2d(6, 5, **settings), 4, uniform(4))
    x = torch.randn(2, 6, 9, 8, generator=GENERATOR) * 2
    result, expected, facts = lowered(layer, x, run_stretch)
    assert facts.integer_macs == facts.macs == expected.numel() * layer.shape[1] * layer.shape[2] * layer.shape[3]
    assert torch.equal(result, expected)


def test_a_grouped_convolution_stays_in_floating_point_and_says_so(run_stretch):
    layer = packed(nn.Conv2d(6, 6, 3, padding=1, groups=6), 4, uniform(4))
    result, expected, facts = lowered(layer, torch.randn(1, 6, 9, 8, generator=GENERATOR), run_stretch)
    assert facts.integer_macs == 0 and "grouped convolutions" in facts.reason
    assert torch.equal(result, expected)


def test_a_depthwise_convolution_reads_a_step_for_each_channel(run_stretch):
    grid = ChannelQuantizer(4, always=True, maps=1)
    grid.set_grid(torch.exp2(torch.arange(6) - 3.0), torch.tensor([0, 3, 15, 1, 8, 2]))
    layer = packed(nn.Conv2d(6, 6, 3, padding=1, groups=6), 4, grid)
    result, expected, _ = lowered(layer, torch.randn(1, 6, 9, 8, generator=GENERATOR), run_stretch)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_a_shift_for_each_channel_leaves_one_product_and_the_bias(bits, bias, run_stretch):
    layer = packed(nn.Linear(24, 10, bias=bias), bits, shifted(bits, 24))
    result, expected, facts = lowered(layer, torch.randn(2, 7, 24, generator=GENERATOR) * 4, run_stretch)
    assert facts.integer_macs == facts.macs
    assert torch.equal(result, expected)


@pytest.mark.parametrize("settings", [{}, {"stride": 2}], ids=str)
def test_a_convolution_of_single_points_reads_a_shifted_grid(settings, run_stretch):
    layer = packed(nn.Conv2d(6, 5, 1, **settings), 4, shifted(4, 6, maps=1))
    result, expected, facts = lowered(layer, torch.randn(2, 6, 9, 8, generator=GENERATOR) * 2, run_stretch)
    assert facts.integer_macs == facts.macs
    assert torch.equal(result, expected)


def test_a_shifted_grid_has_a_decoded_form(run_stretch):
    graph, grid, x = Stretch("site"), shifted(4, 6), torch.randn(5, 6, generator=GENERATOR) * 2
    name = decoded(graph, "x", grid)
    (result,) = run_stretch(graph, {"x": x.numpy()}, [name])
    assert torch.equal(torch.from_numpy(result), grid(x))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_groups_of_channels_are_summed_in_integers(bits, run_stretch):
    layer = packed(nn.Linear(24, 10), bits, grouped(bits, 24))
    result, expected, facts = lowered(layer, torch.randn(7, 24, generator=GENERATOR) * 4, run_stretch)
    assert facts.integer_macs == facts.macs
    assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("bits", "log_codes", "integer"), [(3, 1, True), (4, 2, True), (4, 8, True), (6, 8, True), (6, 16, False)]
)
def test_the_zones_of_a_log_uniform_grid(bits, log_codes, integer, run_stretch):
    layer = packed(nn.Linear(24, 10), 4, hybrid(bits, log_codes))
    x = torch.cat([torch.randn(40, 24, generator=GENERATOR), 6 * torch.rand(40, 24, generator=GENERATOR)])
    result, expected, facts = lowered(layer, x, run_stretch)
    assert (facts.integer_macs == facts.macs) is integer and ("log-uniform" in facts.reason) is not integer
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-5)


def test_a_grid_from_elsewhere_is_refused():
    class Elsewhere(SiteQuantizer):
        grid = ""

    quantizer = Elsewhere(4, always=True)
    quantizer.grid = "elsewhere"
    layer = PackedLayer.like(nn.Linear(3, 2), 4, quantizer)
    with pytest.raises(
        ConfigError, match="the grid 'elsewhere' of site has no ONNX form; quantize with another method"
    ):
        lower_layer(Stretch("site"), layer, "x", "y", ((1, 3), (1, 2)))
