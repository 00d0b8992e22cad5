"""The sites of a packed folder in execution order, and guards for values of its JSON files.

``config.json`` keeps its keys sorted by name, and the report loads no model that could tell the order, so the names
tell it (:mod:`carsam.models.names`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from carsam.models.names import Names

OPERANDS = {"query": "Q", "key": "K", "value": "V", "probs": "P"}
OPERAND_TITLES = {"query": "queries", "key": "keys", "value": "values", "probs": "attention probabilities"}


@dataclass(frozen=True)
class Site:
    """One place that is quantized.

    Attributes:
        name: As bit settings match it: a layer's path (its weights), ``….input``, or an attention's ``….query``.
        kind: ``weight`` or ``activation``.
        grid: Name of the grid.
        bits: None where it is not known.
        layer: The layer that it belongs to, or ``attention``, for headings.
        part: ``w``, ``in``, or ``Q``, ``K``, ``V``, ``P``.
        group: The block, attention or MLP that it lies in.
    """

    name: str
    kind: str
    grid: str
    bits: float | None
    layer: str
    part: str
    group: str

    @property
    def role(self) -> str:
        """In words: ``weights``, ``input``, ``queries``."""
        if self.kind == "weight":
            return "weights"
        return OPERAND_TITLES.get(self.name.rpartition(".")[2], "input")


def layout_sites(layout: dict[str, Any], names: Names) -> list[Site]:
    """Every site of a packed model's layout, in execution order.

    Args:
        layout: ``layout`` of ``quantization_config`` (:mod:`carsam.pack.layout`).
        names: Of the model's family.
    """

    def key(site: Site) -> tuple[Any, ...]:
        # A layer's input comes before its weights.
        return names.execution_key(f"{site.name}.weight" if site.kind == "weight" else site.name)

    sites = []
    for path, spec in mapping(layout.get("layers")).items():
        leaf, group, spec = path.rpartition(".")[2], names.group(path), mapping(spec)
        grid = mapping(spec.get("input"))
        name = f"{path}.input"
        sites.append(Site(name, "activation", str(grid.get("grid", "")), grid.get("bits"), leaf, "in", group))
        sites.append(Site(path, "weight", "uniform", spec.get("weight"), leaf, "w", group))
    for path, operands in mapping(layout.get("attentions")).items():
        for which, grid in mapping(operands).items():
            name, grid = f"{path}.{which}", mapping(grid)
            part = OPERANDS.get(which, which)
            group = names.group(name)
            sites.append(
                Site(name, "activation", str(grid.get("grid", "")), grid.get("bits"), "attention", part, group)
            )
    return sorted(sites, key=key)


def mapping(value: Any) -> dict[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def entries(value: Any) -> list[dict[str, Any]]:
    """The mappings in a list; nothing where it is none."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def numbers_of(value: Any) -> list[Any]:
    """The value where it is a list, else an empty one."""
    return value if isinstance(value, list) else []
