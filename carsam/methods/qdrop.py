"""QDrop (ICLR 2022, arXiv 2203.05740) and BRECQ (ICLR 2021, arXiv 2102.05426): block-wise reconstruction."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from carsam.methods.base import Method
from carsam.models.sites import Sites
from carsam.reconstruct.optimize import ReconstructionSettings
from carsam.reconstruct.units import Unit, decoder_units, encoder_units


@dataclass(frozen=True)
class QDrop(Method):
    """Rounding and step sizes learned per unit while activations are quantized at random.

    Units are encoder blocks and, in the decoder, single attentions and MLPs.

    Attributes:
        reconstruction: Settings of the optimiser loop.
    """

    name: ClassVar[str] = "qdrop"
    summary: ClassVar[str] = "block-wise reconstruction with random dropping of quantization"

    reconstruction: ReconstructionSettings = field(default_factory=ReconstructionSettings)

    def units(self, sites: Sites) -> list[Unit]:
        return encoder_units(sites) + decoder_units(sites, self.granularity)

    def reconstruction_for(self, unit: Unit) -> ReconstructionSettings | None:
        return self.reconstruction

    def unit_settings(self, unit: Unit, sites: Sites) -> dict[str, Any]:
        # The step counts of both kinds of unit are replaced by this unit's own.
        steps = self.steps_for(unit, sites)
        settings = asdict(replace(self.reconstruction, steps=steps, decoder_steps=steps))
        return {**super().unit_settings(unit, sites), "reconstruction": settings}


@dataclass(frozen=True)
class Brecq(QDrop):
    """QDrop's units, nothing dropped: rounding first, with activations in floating point, then steps of activations.

    ``reconstruction.phases: joint`` learns both together, which is ours. In the image encoder a unit is a whole block;
    public code for SAM has attention and MLP apart there.
    """

    name: ClassVar[str] = "brecq"
    summary: ClassVar[str] = "block-wise reconstruction, weights before activations"

    reconstruction: ReconstructionSettings = field(
        default_factory=lambda: ReconstructionSettings(drop=0.0, phases="weights-first")
    )
