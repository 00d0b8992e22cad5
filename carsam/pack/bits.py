"""Packing of codes into bytes: one little-endian stream of b-bit codes, at 4 bits two a byte, low nibble first."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return (count * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packs codes into bytes.

    Args:
        codes: Integers in ``[0, 2**bits)``, any shape; flattened in row-major order.
        bits: 1 to 8.

    Returns:
        (``packed_size(codes.numel(), bits)``,) uint8; unused bits at the end are zero.

    Raises:
        ValueError: A code does not fit.
    """
    flat = codes.flatten().to(torch.uint8)
    if flat.numel() and int(flat.max()) >= 2**bits:
        raise ValueError(f"a code of {int(flat.max())} does not fit into {bits} bits")
    if bits == 8:
        return flat.clone()
    if bits == 4:
        flat = torch.nn.functional.pad(flat, (0, flat.numel() % 2))
        return flat[0::2] | (flat[1::2] << 4)
    stream = (flat[:, None] >> torch.arange(bits, dtype=torch.uint8, device=flat.device)) & 1
    stream = torch.nn.functional.pad(stream.flatten(), (0, -stream.numel() % 8)).view(-1, 8)
    weights = (1 << torch.arange(8, device=flat.device)).to(torch.uint8)
    return (stream * weights).sum(1, dtype=torch.uint8)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_codes`.

    Args:
        packed: (``packed_size(count, bits)``,) uint8.
        bits: 1 to 8.
        count: Number of codes.

    Returns:
        (count,) uint8.

    Raises:
        ValueError: The number of bytes does not fit.
    """
    if packed.numel() != packed_size(count, bits):
        raise ValueError(f"{packed.numel()} bytes do not hold {count} codes of {bits} bits")
    if bits == 8:
        return packed.clone()
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), dim=1).flatten()[:count]
    stream = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    stream = stream.flatten()[: count * bits].view(count, bits)
    weights = (1 << torch.arange(bits, device=packed.device)).to(torch.uint8)
    return (stream * weights).sum(1, dtype=torch.uint8)
