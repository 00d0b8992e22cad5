"""Ranges: what every activation site sees, what its grid covers, and how the values are spread."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from carsam.models.names import Names
from carsam.report import numbers
from carsam.report.charts import histogram
from carsam.report.order import entries, mapping, numbers_of
from carsam.report.sections.base import Section, diagnosed
from carsam.report.source import Source

_NOTABLE = 12
# A grid that clips less, over a single mode, is nothing to look at twice.
_MUCH_CLIPPED = 0.01


def section(source: Source) -> Section:
    """The section."""
    sites = [_site(entry, source.names) for entry in entries((source.diagnosis or {}).get("sites"))]
    sites.sort(key=lambda site: source.names.execution_key(site["name"]))
    notable = [site for site in sites if (site["clipped"] or 0) >= _MUCH_CLIPPED or (site["modes"] or 0) > 1]
    notable.sort(key=lambda site: -(site["clipped"] or 0))
    groups = [
        {"name": name, "short": source.names.short(name), **_summary(list(members))}
        for name, members in groupby(sites, key=lambda site: source.names.group(site["name"]))
    ]
    view = None
    if sites:
        view = {
            "n_sites": len(sites),
            "groups": groups,
            "notable": notable[:_NOTABLE],
            "n_notable": len(notable),
            "n_clipped": sum(1 for site in sites if (site["clipped"] or 0) >= _MUCH_CLIPPED),
            "n_modes": sum(1 for site in sites if (site["modes"] or 0) > 1),
        }
    return diagnosed(source, "ranges", "Ranges", view, "ranges of activations")


def _site(entry: dict[str, Any], names: Names) -> dict[str, Any]:
    name = str(entry.get("site", ""))
    values = {
        key: numbers.finite(entry.get(key)) for key in ("low", "high", "grid_low", "grid_high", "clipped", "modes")
    }
    bins = mapping(entry.get("histogram"))
    counts = [numbers.finite(count) for count in numbers_of(bins.get("counts"))]
    title = f"Histogram of {names.short(name)}"
    if values["low"] is not None and values["high"] is not None:
        title += f", from {numbers.number(values['low'])} to {numbers.number(values['high'])}"
    return {
        "name": name,
        "short": names.short(name),
        "grid": str(entry.get("grid") or ""),
        "bits": entry.get("bits"),
        **values,
        "chart": histogram(
            counts,
            numbers.finite(bins.get("low")),
            numbers.finite(bins.get("high")),
            title=title,
            grid_low=values["grid_low"],
            grid_high=values["grid_high"],
        ),
    }


def _summary(members: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "sites": members,
        "clipped": max((site["clipped"] for site in members if site["clipped"] is not None), default=None),
        "modes": sum(1 for site in members if (site["modes"] or 0) > 1),
    }
