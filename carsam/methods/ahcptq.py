"""AHCPTQ (ICCV 2025, arXiv 2503.03088): Hybrid Log-Uniform Quantization and Channel-Aware Grouping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from carsam.errors import ConfigError
from carsam.methods.qdrop import QDrop
from carsam.models.sites import MLP_IN, MLP_OUT, PROJECTION, Sites
from carsam.quantizers import GroupedQuantizer, HybridQuantizer, SiteQuantizer
from carsam.reconstruct.units import Unit


@dataclass(frozen=True)
class AhcPtq(QDrop):
    """QDrop's reconstruction with a hybrid grid after activations and grids per group of channels after norms.

    Attributes:
        hybrid: HLUQ on the inputs of MLPs' second layers.
        groups: Channel groups of CAG; 1 leaves it out.
    """

    name: ClassVar[str] = "ahcptq"
    summary: ClassVar[str] = "HLUQ and CAG with QDrop's reconstruction"

    hybrid: bool = True
    groups: int = 4

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.groups <= 255:
            raise ConfigError(f"groups must lie in 1 to 255, not {self.groups}.")

    @property
    def notes(self) -> str:
        parts = [super().notes, "MLP inputs log-uniform" if self.hybrid else ""]
        parts.append("projections per group of input channels" if self.groups > 1 else "")
        return "; ".join(part for part in parts if part)

    def quantizer_for(self, site: str, bits: int, role: str) -> SiteQuantizer:
        if self.hybrid and role == MLP_OUT:
            return HybridQuantizer(bits)
        if self.groups > 1 and role in (PROJECTION, MLP_IN):
            return GroupedQuantizer(bits, groups=self.groups)
        return super().quantizer_for(site, bits, role)

    def unit_settings(self, unit: Unit, sites: Sites) -> dict[str, Any]:
        return {**super().unit_settings(unit, sites), "hybrid": self.hybrid, "groups": self.groups}
