"""Arithmetic of the uniform affine grid (METHOD.md, 1): x̂ = s · (clip(round(x / s) + z, 0, qmax) − z)."""

from __future__ import annotations

from torch import Tensor


def qmax(bits: int) -> int:
    """Largest code of ``bits`` bits."""
    return 2**bits - 1


def grid_from_range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and zero point of the grid that spans a range, widened to contain zero.

    Args:
        low, high: Ends of the range, any (equal) shape.
        bits: Bits of a code.

    Returns:
        ``(scale, zero_point)`` of that shape; scale > 0, zero_point an integer in ``[0, qmax]`` (as float).
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    # A site that only ever saw zeros still needs a grid: any positive step represents it exactly.
    scale = ((high - low) / qmax(bits)).clamp(min=1e-8)
    return scale, (-low / scale).round().clamp(0, qmax(bits))


def encode(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes of ``x`` (as float integers in ``[0, qmax]``); scale and zero point broadcast against ``x``."""
    return (x / scale).round_().add_(zero_point).clamp_(0, qmax(bits))


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Values of codes: ``scale · (codes − zero_point)``."""
    return (codes - zero_point) * scale
