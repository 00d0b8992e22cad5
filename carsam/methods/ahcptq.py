"""AHCPTQ (ICCV 2025, arXiv 2503.03088): Hybrid Log-Uniform Quantization and Channel-Aware Grouping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from carsam.errors import ConfigError
from carsam.methods.ptq4sam import Ptq4SamParts
from carsam.methods.qdrop import QDrop
from carsam.models.sites import MLP_IN, MLP_OUT, PROJECTION, Sites
from carsam.quantizers import GroupedQuantizer, HybridQuantizer, SiteQuantizer
from carsam.quantizers.grouped import GROUP_BY, MERGED_BY
from carsam.reconstruct.units import Unit


@dataclass(frozen=True)
class AhcPtq(Ptq4SamParts, QDrop):
    """PTQ4SAM-L with a hybrid grid after activations and grids per group of channels after norms.

    As the public code, with two repairs that are always on: AGQ has the values that its bits hold (``extra_code`` gives
    the public code's), and large values of a hybrid site stay large (there they fall into the log zone where they
    exceed its number of codes). ``merged_by: error`` is an optional repair, ``progressive: false`` with ``group_by:
    ranges`` another.

    Attributes:
        hybrid: HLUQ on the inputs of MLPs' second layers.
        groups: Channel groups of CAG in the end; 1 leaves it out.
        progressive: Channels are grouped while their steps are learned; otherwise once, before.
        group_by: What groups of channels have in common: ``grids`` or ``ranges``
            (:func:`carsam.quantizers.grouped.group_grids`).
        merged_by: The step of a merged group: the ``mean`` of its members', or that of least ``error`` on the members'
            values: a mean clips the wide ones, which short schedules cannot mend (docs/RESULTS.md, 15).
    """

    name: ClassVar[str] = "ahcptq"
    summary: ClassVar[str] = "BIG, AGQ, HLUQ and CAG with QDrop's reconstruction"

    hybrid: bool = True
    groups: int = 4
    progressive: bool = True
    group_by: str = "grids"
    merged_by: str = "mean"

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.groups <= 255:
            raise ConfigError(f"groups must lie in 1 to 255, not {self.groups}.")
        for setting, allowed in (("group_by", GROUP_BY), ("merged_by", MERGED_BY)):
            value = getattr(self, setting)
            if value not in allowed:
                raise ConfigError(f"unknown {setting} {value!r}; choose from {', '.join(allowed)}.")

    @property
    def notes(self) -> str:
        parts = [super().notes, "MLP inputs log-uniform, large values kept" if self.hybrid else ""]
        if self.groups > 1:
            merged = ", merged by least error" if self.merged_by == "error" else ""
            how = merged if self.progressive else ", grouped once"
            parts.append(f"projections per group of input channels{how}")
        return "; ".join(part for part in parts if part)

    def quantizer_for(self, site: str, bits: int, role: str) -> SiteQuantizer:
        if self.hybrid and role == MLP_OUT:
            return HybridQuantizer(bits)
        if self.groups > 1 and role in (PROJECTION, MLP_IN):
            options = {"progressive": self.progressive, "by": self.group_by, "merged_by": self.merged_by}
            return GroupedQuantizer(bits, groups=self.groups, **options)
        return super().quantizer_for(site, bits, role)

    def unit_settings(self, unit: Unit, sites: Sites) -> dict[str, Any]:
        settings = {**super().unit_settings(unit, sites), "hybrid": self.hybrid, "groups": self.groups}
        if self.groups > 1:
            settings |= {name: getattr(self, name) for name in ("progressive", "group_by", "merged_by")}
        return settings
