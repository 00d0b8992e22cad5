"""RTN: round to nearest with observed ranges; the floor that every other method starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from carsam.methods.base import Method


@dataclass(frozen=True)
class Rtn(Method):
    """Nearest rounding; ranges from the observer over the float model's activations."""

    name: ClassVar[str] = "rtn"
    summary: ClassVar[str] = "round to nearest, observed ranges"
