"""AHCQ-SAM (arXiv 2503.03088 v4, April 2026): AHCPTQ with smaller condition numbers (ACNR) and LNQ for P."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from carsam.compensate.acnr import AcnrReport, AcnrSettings, compensate_layers
from carsam.methods.ahcptq import AhcPtq
from carsam.models.sites import Sites
from carsam.reconstruct.optimize import UnitData
from carsam.reconstruct.units import Unit, check_granularity, run_unit


@dataclass(frozen=True)
class AhcqSam(AhcPtq):
    """BIG, HLUQ and CAG as AHCPTQ has them, LNQ in AGQ's place on all softmax outputs, ACNR; whole decoder blocks.

    The public code runs ACNR over the whole network before anything is reconstructed: front to back, activations
    quantized, weights in floating point, and the float targets keep the weights from before. Here a unit's turn comes
    with the units in front of it finished, so ACNR runs in :meth:`prepare_unit`: after the unit's ranges are observed,
    before they are observed again and its rounding is learned. It cannot be a transform of the float model, whose
    outputs are the targets.

    Attributes:
        softmax: ``log1p`` is LNQ.
        acnr: Settings of ACNR.
        granularity: Decoder units: ``block`` is the public code's, a two-way block with both outputs.
    """

    name: ClassVar[str] = "ahcq-sam"
    summary: ClassVar[str] = "AHCPTQ with BIG, ACNR and LNQ, decoder blocks as units"

    softmax: str = "log1p"
    acnr: AcnrSettings = field(default_factory=AcnrSettings)
    granularity: str = "block"

    def __post_init__(self):
        super().__post_init__()
        check_granularity(self.granularity)

    def prepare_unit(
        self,
        model: nn.Module,
        unit: Unit,
        data: UnitData,
        sites: Sites,
        device: torch.device,
    ) -> list[AcnrReport]:
        """ACNR on the unit's ill-conditioned Linear layers."""
        if not self.acnr.enabled:
            return []

        def run(cache: Any, index: int) -> None:
            run_unit(model, unit, cache.get(index, device))

        indices = range(len(data.quantized))
        passes = [(partial(run, data.floating, index), partial(run, data.quantized, index)) for index in indices]
        names = [site.name for site in sites.layers if unit.holds(site.name)]
        return compensate_layers(model, names, passes, self.acnr, weight_observer=self.weight_observer)

    def unit_settings(self, unit: Unit, sites: Sites) -> dict[str, Any]:
        settings = super().unit_settings(unit, sites)
        # Without them a unit comes out as AHCPTQ's.
        if self.acnr.enabled:
            settings["acnr"] = asdict(self.acnr)
        return settings
