"""Packing of codes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carsam.pack.bits import pack_codes, packed_size, unpack_codes


@given(st.data())
def test_round_trip(data):
    bits = data.draw(st.integers(1, 8))
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=67)), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == packed_size(codes.numel(), bits)
    assert torch.equal(unpack_codes(packed, bits, codes.numel()), codes)


def test_low_nibble_first():
    assert pack_codes(torch.tensor([1, 2, 15]), 4).tolist() == [0x21, 0x0F]


@given(st.lists(st.integers(0, 15), max_size=33))
def test_four_bits_are_the_general_stream(codes):
    """The fast path for 4 bits and the general little-endian stream are one format."""
    stream = sum(code << (4 * i) for i, code in enumerate(codes))
    expected = list(stream.to_bytes(packed_size(len(codes), 4), "little"))
    assert pack_codes(torch.tensor(codes, dtype=torch.uint8), 4).tolist() == expected


@given(st.integers(1, 8), st.integers(0, 40), st.randoms())
def test_the_stream_is_little_endian_at_every_width(bits, count, random):
    codes = [random.randrange(2**bits) for _ in range(count)]
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    expected = list(stream.to_bytes(packed_size(count, bits), "little"))
    assert pack_codes(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == expected


def test_misfits_are_refused():
    with pytest.raises(ValueError, match="does not fit into 4 bits"):
        pack_codes(torch.tensor([16]), 4)
    with pytest.raises(ValueError, match="do not hold"):
        unpack_codes(torch.zeros(3, dtype=torch.uint8), 4, 8)
