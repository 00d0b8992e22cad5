"""The uniform grid of an activation site, one for the whole tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from carsam.quantizers.affine import decode, encode, grid_from_range, qmax
from carsam.quantizers.record import SiteRecord
from carsam.quantizers.site import SiteQuantizer


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

    def record(self) -> UniformRecord:
        return UniformRecord()

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

    def position(self, x: Tensor, scale: Tensor) -> tuple[Tensor, float | Tensor, float | Tensor]:
        # Half a step beyond the last code: what rounds to it is not clipped.
        # On a GPU the step stays there: reading it would wait for all that is under way, at every site of every step.
        step, (low, high) = scale if scale.is_cuda else scale.item(), self.limits()
        return x, step * (low - 0.5), step * (high + 0.5)

    def encode(self, x: Tensor) -> Tensor:
        return encode(x, self.scale, self.zero_point, self.bits).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return decode(codes.float(), self.scale, self.zero_point)


class UniformRecord(SiteRecord):
    """The record of a site with a uniform grid."""

    def fit(self, quantizer: ActivationQuantizer, observer: str) -> None:
        """Sets the grid to what the observer makes of the record."""
        quantizer.set_grid(*self.uniform_grid(quantizer.bits, observer))
