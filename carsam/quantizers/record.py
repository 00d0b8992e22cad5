"""What a grid wants to remember of its site while the model is calibrated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from carsam.quantizers.ranges import observed_grid
from carsam.quantizers.sampling import strided

if TYPE_CHECKING:
    from carsam.quantizers.site import SiteQuantizer

# Values of one site kept from one forward pass. Ranges come from the exact ends; the sample only weighs the inside.
SAMPLE_SIZE = 2**14


class Record(ABC):
    """What was seen at one site, and how its quantizer's grid follows from it."""

    @property
    @abstractmethod
    def seen(self) -> bool:
        """Whether any value came by."""

    @abstractmethod
    def update(self, values: Tensor, **context: Any) -> None:
        """Takes the values of one forward pass.

        Args:
            values: Any shape.
            context: What else the quantizer was called with (see :meth:`SiteQuantizer.forward`).
        """

    @abstractmethod
    def fit(self, quantizer: SiteQuantizer, observer: str) -> None:
        """Sets the quantizer's grid.

        Args:
            quantizer: Of the grid that made the record.
            observer: Name of the range search, one of :data:`carsam.quantizers.ranges.OBSERVERS`.
        """


class SiteRecord(Record):
    """Exact ends of every pass, and an evenly strided sample of the values."""

    def __init__(self) -> None:
        self.lows: list[float] = []
        self.highs: list[float] = []
        self.samples: list[Tensor] = []

    @property
    def seen(self) -> bool:
        return bool(self.highs)

    def update(self, values: Tensor, **_: Any) -> None:
        values = values.detach()
        low, high = values.aminmax()
        self.lows.append(low.item())
        self.highs.append(high.item())
        self.samples.append(strided(values, SAMPLE_SIZE).to("cpu", torch.float32).clone())

    @property
    def sample(self) -> Tensor:
        """The values kept, (n,) float32."""
        return torch.cat(self.samples)

    def uniform_grid(self, bits: int, observer: str) -> tuple[Tensor, Tensor]:
        """Step and zero point (scalars) of the uniform grid that the observer makes of the record."""
        return observed_grid(observer, torch.tensor(self.lows), torch.tensor(self.highs), self.sample, bits)
