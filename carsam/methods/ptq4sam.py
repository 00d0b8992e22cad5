"""PTQ4SAM (CVPR 2024, arXiv 2405.03144): Bimodal Integration and Adaptive Granularity Quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from carsam.errors import ConfigError
from carsam.methods.base import Method
from carsam.methods.qdrop import QDrop
from carsam.models.sites import Sites
from carsam.prompts.calibration import CalibrationSet
from carsam.quantizers import SoftmaxQuantizer, softmax_grids
from carsam.reconstruct.units import Unit
from carsam.transform.bimodal import BIMODAL_RULES, integrate_bimodal_keys


@dataclass(frozen=True)
class Ptq4SamParts(Method):
    """BIG and AGQ, which AHCPTQ and AHCQ-SAM take over.

    Attributes:
        softmax: ``log2`` is AGQ.
        extra_code: P with one value more than its bits hold, as public code computes AGQ and LNQ.
        bimodal_integration: BIG on decoder keys.
        bimodal_rule: Which keys BIG judges, and on what: ``calibration``, which is ours, or ``published``
            (:func:`carsam.transform.bimodal.integrate_bimodal_keys`; docs/RESULTS.md, 15, compares them).
    """

    softmax: str = "log2"
    extra_code: bool = False
    bimodal_integration: bool = True
    bimodal_rule: str = "calibration"

    def __post_init__(self):
        super().__post_init__()
        if self.bimodal_rule not in BIMODAL_RULES:
            raise ConfigError(f"unknown bimodal_rule {self.bimodal_rule!r}; choose from {', '.join(BIMODAL_RULES)}.")
        having = [name for name, grid in softmax_grids().items() if "extra_code" in grid.arguments]
        if self.extra_code and self.softmax not in having:
            raise ConfigError(f"extra_code belongs to softmax={' or '.join(having)}, not to {self.softmax}.")

    @property
    def notes(self) -> str:
        parts = [super().notes + (" and one code too many" if self.extra_code else "")]
        if self.bimodal_integration and self.bimodal_rule != "published":
            parts.append("BIG by all calibration images")
        return "; ".join(part for part in parts if part)

    def softmax_for(self, site: str, bits: int) -> SoftmaxQuantizer:
        if self.extra_code:
            return softmax_grids()[self.softmax](bits, extra_code=1)
        return super().softmax_for(site, bits)

    def transform(self, model: nn.Module, sites: Sites, data: CalibrationSet) -> list[dict[str, Any]]:
        if not self.bimodal_integration:
            return []
        return integrate_bimodal_keys(model, sites, data, rule=self.bimodal_rule)

    def unit_settings(self, unit: Unit, sites: Sites) -> dict[str, Any]:
        # BIG is in the weights that units start from.
        more = {"extra_code": True} if self.extra_code else {}
        return {**super().unit_settings(unit, sites), **more}


@dataclass(frozen=True)
class Ptq4SamS(Ptq4SamParts):
    """The static form: ranges and nearest rounding, no reconstruction."""

    name: ClassVar[str] = "ptq4sam-s"
    summary: ClassVar[str] = "BIG and AGQ, round to nearest"


@dataclass(frozen=True)
class Ptq4SamL(Ptq4SamParts, QDrop):
    """The learned form: QDrop's reconstruction after BIG, with AGQ."""

    name: ClassVar[str] = "ptq4sam-l"
    summary: ClassVar[str] = "BIG and AGQ with QDrop's reconstruction"
