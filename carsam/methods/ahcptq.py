"""AHCPTQ (ICCV 2025, arXiv 2503.03088): Hybrid Log-Uniform Quantization and Channel-Aware Grouping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from carsam.errors import ConfigError
from carsam.methods.ptq4sam import Ptq4SamParts
from carsam.methods.qdrop import QDrop
from carsam.models.sites import MLP_IN, MLP_OUT, PROJECTION, Sites
from carsam.quantizers import GroupedQuantizer, HybridQuantizer, SiteQuantizer
from carsam.quantizers.grouped import GROUP_BY
from carsam.reconstruct.units import Unit


@dataclass(frozen=True)
class AhcPtq(Ptq4SamParts, QDrop):
    """PTQ4SAM-L with a hybrid grid after activations and grids per group of channels after norms.

    As the public code, with two repairs that are always on: AGQ has the values that its bits hold (``extra_code`` gives
    the public code's), and large values of a hybrid site stay large (there they fall into the log zone where they
    exceed its number of codes). ``progressive: false`` with ``group_by: ranges`` is a repair that is an option.

    Attributes:
        hybrid: HLUQ on the inputs of MLPs' second layers.
        groups: Channel groups of CAG in the end; 1 leaves it out.
        progressive: Channels are grouped while their steps are learned; otherwise once, before.
        group_by: What groups of channels have in common: ``grids`` or ``ranges``
            (:func:`carsam.quantizers.grouped.group_grids`).
    """

    name: ClassVar[str] = "ahcptq"
    summary: ClassVar[str] = "BIG, AGQ, HLUQ and CAG with QDrop's reconstruction"

    hybrid: bool = True
    groups: int = 4
    progressive: bool = True
    group_by: str = "grids"

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.groups <= 255:
            raise ConfigError(f"groups must lie in 1 to 255, not {self.groups}.")
        if self.group_by not in GROUP_BY:
            raise ConfigError(f"unknown group_by {self.group_by!r}; choose from {', '.join(GROUP_BY)}.")

    @property
    def notes(self) -> str:
        parts = [super().notes, "MLP inputs log-uniform, large values kept" if self.hybrid else ""]
        if self.groups > 1:
            once = "" if self.progressive else ", grouped once"
            parts.append(f"projections per group of input channels{once}")
        return "; ".join(part for part in parts if part)

    def quantizer_for(self, site: str, bits: int, role: str) -> SiteQuantizer:
        if self.hybrid and role == MLP_OUT:
            return HybridQuantizer(bits)
        if self.groups > 1 and role in (PROJECTION, MLP_IN):
            return GroupedQuantizer(bits, groups=self.groups, progressive=self.progressive, by=self.group_by)
        return super().quantizer_for(site, bits, role)

    def unit_settings(self, unit: Unit, sites: Sites) -> dict[str, Any]:
        settings = {**super().unit_settings(unit, sites), "hybrid": self.hybrid, "groups": self.groups}
        if self.groups > 1:
            settings |= {"progressive": self.progressive, "group_by": self.group_by}
        return settings
