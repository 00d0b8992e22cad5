"""compressed-tensors (vLLM's storage format): grids, per-channel and grouped quantization, packing.

Its integers are signed: codes and zero points are ours minus 2^(bits − 1).
"""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams

from carsam.pack.bits import pack_codes, unpack_codes
from carsam.quantizers.affine import decode, encode, grid_from_range
from carsam.quantizers.grouped import GroupedQuantizer
from carsam.quantizers.rounding import weight_grid

BITS = (2, 3, 4, 6, 8)


def arguments(bits, strategy=QuantizationStrategy.CHANNEL, **options):
    return QuantizationArgs(num_bits=bits, symmetric=False, strategy=strategy, **options)


@pytest.mark.parametrize("bits", BITS)
def test_grid_of_a_range(bits):
    """The range is widened to hold zero, the zero point rounded and clipped to the codes."""
    generator = torch.Generator().manual_seed(0)
    low, high = (20 * torch.randn(2, 1000, generator=generator)).sort(0).values
    scale, zero = grid_from_range(low, high, bits)
    their_scale, their_zero = calculate_qparams(low, high, arguments(bits))
    torch.testing.assert_close(scale, their_scale)
    # They round −2^(bits−1) − low/scale, we −low/scale: in single precision a near-half may fall to the other side.
    differ = zero - 2 ** (bits - 1) != their_zero.float()
    quotient = -low.clamp(max=0) / scale
    assert not bool((differ & ((quotient - quotient.floor() - 0.5).abs() > 1e-4)).any()) and differ.sum() <= 2


@pytest.mark.parametrize("bits", BITS)
def test_weights_per_channel(bits, weight):
    scale, zero = (v[:, None] for v in weight_grid(weight, bits))
    offset, ours = 2 ** (bits - 1), encode(weight, *(v[:, None] for v in weight_grid(weight, bits)), bits)
    options = arguments(bits)
    theirs = quantize(weight, scale, (zero - offset).to(torch.int8), options, dtype=torch.int8)
    assert torch.equal(ours - offset, theirs.float())
    values = dequantize(theirs, scale, (zero - offset).to(torch.int8), options)
    torch.testing.assert_close(decode(ours, scale, zero), values)


@torch.no_grad()
@pytest.mark.parametrize("bits", BITS)
def test_channel_groups(bits, activations):
    """A grid per group of input channels; theirs are neighbours, so our groups are made of neighbours here."""
    groups, size = 4, 24
    parts = activations.unflatten(1, (groups, size))
    scale, zero = grid_from_range(parts.amin((0, 2)) / 2, parts.amax((0, 2)) / 2, bits)
    ours = GroupedQuantizer(bits, always=True, groups=groups, channels=groups * size)
    ours.set_grid(scale, zero, torch.arange(groups).repeat_interleave(size))

    options = arguments(bits, QuantizationStrategy.GROUP, group_size=size)
    rows = [v.expand(len(activations), groups) for v in (scale, zero - 2 ** (bits - 1))]
    theirs = fake_quantize(activations, rows[0], rows[1].to(torch.int8), options)
    torch.testing.assert_close(ours(activations), theirs)
    assert len(scale.unique()) == groups


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_bytes(bits):
    """Both are one little-endian stream of codes; theirs fills up each row to 32 bits, so rows here are full."""
    codes = torch.randint(0, 2**bits, (5, 64), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    theirs = pack_to_int32(signed, bits)
    ours = pack_codes(codes, bits)
    assert theirs.numpy().astype("<i4").tobytes() == ours.numpy().tobytes()
    # And each reads what the other wrote.
    theirs_of_ours = unpack_from_int32(ours.view(torch.int32).view(5, -1), bits, codes.shape)
    assert torch.equal(theirs_of_ours, signed)
    assert torch.equal(unpack_codes(theirs.view(torch.uint8).flatten(), bits, codes.numel()).view_as(codes), codes)
