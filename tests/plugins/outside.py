"""A package from outside: a grid for activations, one for softmax outputs, and a method that uses both.

Tests copy this file into a folder of its own and announce it there (see ``test_plugins.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from carsam.methods.qdrop import QDrop
from carsam.models.sites import MLP_OUT
from carsam.quantizers import SiteQuantizer, SoftmaxQuantizer, current
from carsam.quantizers.record import SiteRecord


class MovedQuantizer(SiteQuantizer):
    """Equal steps from the least value on: x̂ = scale · (shift + code); zero need not be on the grid.

    Buffers: ``scale`` and ``shift``, in steps; float32 scalars.
    """

    grid = "toy-shifted"
    note = "shifted"
    arguments: ClassVar[dict[str, int]] = {"widened": 100}

    def __init__(self, bits: int, *, always: bool = False, widened: int = 0):
        super().__init__(bits, always=always)
        self.widened = widened
        if bits < 16:
            self.register_buffer("shift", torch.tensor(0.0))

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "widened": self.widened}

    def record(self) -> MovedRecord:
        return MovedRecord()

    def _codes(self, x: Tensor, scale: Tensor) -> Tensor:
        return (x / scale - self.shift).round_().clamp_(0, 2**self.bits - 1)

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        return self._codes(x, scale).add_(self.shift).mul_(scale)

    def position(self, x: Tensor, scale: Tensor) -> tuple[Tensor, float, float]:
        step, shift = scale.item(), self.shift.item()
        return x, step * (shift - 0.5), step * (shift + 2**self.bits - 0.5)

    def encode(self, x: Tensor) -> Tensor:
        return self._codes(x, self.scale).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return (codes.float() + self.shift) * self.scale


class MovedRecord(SiteRecord):
    """From the least value seen to the greatest, whatever the observer."""

    def fit(self, quantizer: MovedQuantizer, observer: str) -> None:
        low, high = torch.tensor(min(self.lows)), torch.tensor(max(self.highs))
        low, high = (end + side * (high - low) * quantizer.widened / 100 for end, side in ((low, -1), (high, 1)))
        scale = ((high - low) / (2**quantizer.bits - 1)).clamp(min=1e-3 * high.abs().clamp(min=1e-6))
        quantizer.load_grid({"scale": scale, "shift": low / scale})


class SquareRootSoftmax(SoftmaxQuantizer):
    """Codes in equal steps of √P; nothing is calibrated."""

    grid = "toy-root"
    note = "square-root codes"

    def __init__(self, bits: int, *, always: bool = False):
        super().__init__()
        self.bits, self.always = bits, always

    def forward(self, scores: Tensor, value: Tensor | None = None) -> Tensor:
        probs = torch.softmax(scores, dim=-1)
        if self.bits >= 16 or not (self.always or current().activations):
            return probs
        rounded = (probs.sqrt() * (2**self.bits - 1)).round().div(2**self.bits - 1).square()
        return probs + (rounded - probs).detach()


@dataclass(frozen=True)
class Toy(QDrop):
    """QDrop on the grids above, where an MLP's second layer reads and at every softmax.

    Attributes:
        widened: Percent by which ranges are widened at both ends.
    """

    name: ClassVar[str] = "toy"
    summary: ClassVar[str] = "a method from outside"

    softmax: str = "toy-root"
    widened: int = 5

    @property
    def notes(self) -> str:
        return "; ".join(part for part in (super().notes, "second layers shifted") if part)

    def quantizer_for(self, site: str, bits: int, role: str = "") -> SiteQuantizer:
        if role == MLP_OUT:
            return MovedQuantizer(bits, widened=self.widened)
        return super().quantizer_for(site, bits, role)

    def unit_settings(self, unit: Any, sites: Any) -> dict[str, Any]:
        return {**super().unit_settings(unit, sites), "widened": self.widened}
