"""PTQ4SAM (CVPR 2024, arXiv 2405.03144): Bimodal Integration and Adaptive Granularity Quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from carsam.methods.base import Method
from carsam.methods.qdrop import QDrop
from carsam.models.sites import Sites
from carsam.prompts.calibration import CalibrationSet
from carsam.transform.bimodal import integrate_bimodal_keys


@dataclass(frozen=True)
class _Ptq4Sam(Method):
    """What both forms share.

    Attributes:
        bimodal_integration: BIG on decoder keys.
    """

    softmax: str = "log2"
    bimodal_integration: bool = True

    def transform(self, model: nn.Module, sites: Sites, data: CalibrationSet) -> list[dict[str, Any]]:
        return integrate_bimodal_keys(model, sites, data) if self.bimodal_integration else []


@dataclass(frozen=True)
class Ptq4SamS(_Ptq4Sam):
    """The static form: ranges and nearest rounding, no reconstruction."""

    name: ClassVar[str] = "ptq4sam-s"
    summary: ClassVar[str] = "BIG and AGQ, round to nearest"


@dataclass(frozen=True)
class Ptq4SamL(_Ptq4Sam, QDrop):
    """The learned form: QDrop's reconstruction after BIG, with AGQ."""

    name: ClassVar[str] = "ptq4sam-l"
    summary: ClassVar[str] = "BIG and AGQ with QDrop's reconstruction"
