"""The uniform affine grid (METHOD.md, 1): x̂ = s · (clip(round(x / s) + z, 0, qmax) − z)."""

from __future__ import annotations

import torch
from torch import Tensor

from carsam.quantizers.site import SiteQuantizer


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


class ActivationQuantizer(SiteQuantizer):
    """Per-tensor uniform quantizer of one activation site.

    Buffers: ``scale`` (float32 scalar), the step, and ``zero_point`` (uint8 scalar).
    """

    grid = "uniform"

    def __init__(self, bits: int, *, always: bool = False):
        super().__init__(bits, always=always)
        self._limits: tuple[int, float, float] = (-1, 0.0, 0.0)
        if bits < 16:
            self.register_buffer("zero_point", torch.tensor(0, dtype=torch.uint8))

    def set_range(self, low: float, high: float) -> None:
        """Spans the grid over a range (widened to contain zero)."""
        scale, zero = grid_from_range(torch.tensor(low), torch.tensor(high), self.bits)
        self.set_grid(scale, zero)

    def set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Sets step and zero point (scalars)."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point.to(torch.uint8))

    def load_grid(self, buffers: dict[str, Tensor]) -> None:
        self.set_grid(buffers["scale"], buffers["zero_point"])

    def limits(self) -> tuple[float, float]:
        """Ends of the grid in steps, ``(−z, qmax − z)``: read from the buffer only after it changed."""
        version = self.zero_point._version
        if self._limits[0] != version:
            low = -float(self.zero_point)
            self._limits = (version, low, low + qmax(self.bits))
        return self._limits[1:]

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        return (x / scale).round_().clamp_(*self.limits()).mul_(scale)

    def position(self, x: Tensor, scale: Tensor) -> tuple[Tensor, float, float]:
        # Half a step beyond the last code: what rounds to it is not clipped.
        step, (low, high) = scale.item(), self.limits()
        return x, step * (low - 0.5), step * (high + 0.5)

    def encode(self, x: Tensor) -> Tensor:
        return encode(x, self.scale, self.zero_point, self.bits).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return decode(codes.float(), self.scale, self.zero_point)
