"""AdaRound (ICML 2020, arXiv 2004.10568): learned rounding, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from carsam.methods.qdrop import QDrop
from carsam.reconstruct.optimize import ReconstructionSettings


@dataclass(frozen=True)
class AdaRound(QDrop):
    """Each layer's rounding learned against its own float output; ranges are observed, not learned."""

    name: ClassVar[str] = "adaround"
    summary: ClassVar[str] = "learned rounding, one layer at a time"

    reconstruction: ReconstructionSettings = field(
        default_factory=lambda: ReconstructionSettings(drop=0.0, learn_scales=False, per_layer=True)
    )
