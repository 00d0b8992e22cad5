"""CAR-SAM (CVPR 2026, arXiv 2605.16901): MatMul-Aware Compensation and Joint Cross-Attention Reconstruction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from carsam.compensate.mac import Coupled, MacReport, MacSettings, attention_calls, compensate_attention
from carsam.methods.qdrop import QDrop
from carsam.models.sites import AttentionSite, Sites
from carsam.reconstruct.optimize import ReconstructionSettings, UnitData
from carsam.reconstruct.units import Unit, check_granularity, decoder_units, encoder_units, run_unit


@dataclass(frozen=True)
class CarSam(QDrop):
    """QDrop with MAC at each attention of decoder and memory, and JCAR units in the decoder.

    Unlike in QDrop, softmax outputs are always quantized while reconstructing; ``reconstruction.drop_probs`` restores
    what the paper's base method does. docs/RESULTS.md has both.

    Attributes:
        mac: Settings of the compensation; all branches off leaves it out.
        granularity: Decoder units: ``pair`` is JCAR, ``module`` leaves it out, ``block`` and ``decoder`` go further.
    """

    name: ClassVar[str] = "car-sam"
    summary: ClassVar[str] = "QDrop with MAC and JCAR in the mask decoder"

    reconstruction: ReconstructionSettings = field(default_factory=lambda: ReconstructionSettings(drop_probs=False))
    mac: MacSettings = field(default_factory=MacSettings)
    granularity: str = "pair"

    def __post_init__(self):
        super().__post_init__()
        check_granularity(self.granularity)

    def units(self, sites: Sites) -> list[Unit]:
        return encoder_units(sites) + decoder_units(sites, self.granularity)

    def prepare_unit(
        self,
        model: nn.Module,
        unit: Unit,
        data: UnitData,
        sites: Sites,
        device: torch.device,
    ) -> list[MacReport]:
        """MAC at each coupled attention of a unit, in execution order, each after the one before it."""
        coupled = _coupled(sites, unit)
        if not self.mac.enabled or not coupled:
            return []
        runs = [
            lambda index=index: run_unit(model, unit, data.quantized.get(index, device))
            for index in range(len(data.quantized))
        ]
        attentions = [Coupled.of(model, site) for site in coupled]
        floating: dict[str, list[dict[str, Tensor]]] = {}
        if self.mac.targets == "float":
            # All before the first projection changes: the unit still is the float model's.
            float_runs = [
                lambda index=index: run_unit(model, unit, data.floating.get(index, device))
                for index in range(len(data.floating))
            ]
            floating = {each.name: list(attention_calls(each, float_runs, quantized=False)) for each in attentions}
        return [self.compensate(each, runs, floating.get(each.name)) for each in attentions]

    def compensate(
        self, attention: Coupled, runs: list[Callable[[], object]], floating: list[dict[str, Tensor]] | None = None
    ) -> MacReport:
        """MAC at one attention, which each of ``runs`` reaches; ``floating``: its inputs in the float model."""
        return compensate_attention(
            attention,
            runs,
            self.mac,
            weight_observer=self.weight_observer,
            activation_observer=self.activation_observer,
            floating=floating,
        )

    def unit_settings(self, unit: Unit, sites: Sites) -> dict[str, Any]:
        settings = super().unit_settings(unit, sites)
        # Where nothing is compensated, as in the encoder, a unit is the same with MAC and without, and as QDrop's.
        if self.mac.enabled and (sites.in_decoder(unit.stage) or _coupled(sites, unit)):
            settings["mac"] = asdict(self.mac)
        return settings


def _coupled(sites: Sites, unit: Unit) -> list[AttentionSite]:
    """Attentions of a unit with projections that MAC can change one by one: in the decoder, and in a video's memory."""
    return [site for site in sites.attentions if site.coupled and unit.holds(site.name)]
