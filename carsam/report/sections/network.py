"""The network by site: bits of weights and activations, and what each site costs."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import Any

from carsam.report import numbers
from carsam.report.charts import Cell, MapRow, bit_map, bits_class, error_scale
from carsam.report.order import Site, entries
from carsam.report.sections.base import Section, percent
from carsam.report.source import Source


def section(source: Source) -> Section:
    """The section."""
    diagnosis = source.diagnosis or {}
    sensitivity = {
        (str(entry.get("site")), str(entry.get("kind"))): entry for entry in entries(diagnosis.get("sensitivity"))
    }
    weight_errors = {str(entry.get("site")): entry.get("error") for entry in entries(diagnosis.get("weights"))}
    sites = []
    for site in source.sites:
        measured = sensitivity.get((site.name, site.kind), {})
        sites.append(
            {
                "site": site,
                "short": source.names.short(site.name),
                "error": numbers.finite(measured.get("error")),
                "iou": percent(measured.get("iou")),
                "weight_error": numbers.finite(weight_errors.get(site.name)) if site.kind == "weight" else None,
            }
        )
    # One measure for the whole map: what a site alone does to the masks, or else how far its weights moved.
    key = "error" if any(entry["error"] is not None for entry in sites) else "weight_error"
    scale = error_scale([entry[key] for entry in sites])
    rows = [
        MapRow(source.names.row_label(group), [_cell(entry, key, _heading(entry, source)) for entry in members])
        for group, members in groupby(sites, key=lambda entry: entry["site"].group)
    ]
    view: dict[str, Any] = {
        "sites": sites,
        "measure": key if scale else "",
        "error_range": (scale.low, scale.high) if scale else None,
        "legend": _legend(source.sites),
        "n_weights": sum(site.kind == "weight" for site in source.sites),
        "n_activations": sum(site.kind == "activation" for site in source.sites),
        "has_errors": any(entry["error"] is not None for entry in sites),
        "has_weight_errors": any(entry["weight_error"] is not None for entry in sites),
        "chart": bit_map(
            rows,
            name="network-map",
            title="Bits of every site",
            desc=f"A row per block, a cell per site in execution order. {_sentence(_counts(source.sites))} "
            "The table below lists every site.",
        ),
    }
    return Section("network", "Network map", view)


def _heading(entry: dict[str, Any], source: Source) -> str:
    layer = entry["site"].layer
    return "matmul" if layer == "attention" else source.names.headings.get(layer, layer)


def _cell(entry: dict[str, Any], key: str, heading: str) -> Cell:
    site: Site = entry["site"]
    words = f"{site.name.removesuffix('.input') if site.part == 'in' else site.name}, {site.role}: "
    words += f"{numbers.whole(site.bits)} bits"
    if site.grid and site.grid != "uniform":
        words += f", {site.grid}"
    if entry[key] is not None:
        words += f", error {numbers.number(entry[key], 2)}"
    bits = numbers.finite(site.bits)
    return Cell(heading, site.part, site.kind == "weight", bits, entry[key], words)


def _counts(sites: list[Site]) -> list[tuple[str, str, int]]:
    """(kind, bits, sites), the most frequent first."""
    counted = Counter((site.kind, numbers.whole(site.bits)) for site in sites)
    return [(kind, bits, n) for (kind, bits), n in sorted(counted.items(), key=lambda item: (item[0][0], -item[1]))]


def _sentence(counts: list[tuple[str, str, int]]) -> str:
    plural = {"weight": "weights", "activation": "activations"}
    return " ".join(f"{n} {plural[kind]} at {bits} bits." for kind, bits, n in counts)


def _legend(sites: list[Site]) -> list[tuple[str, str]]:
    """(class, text) of the bit-widths in the map."""
    found = sorted({numbers.finite(site.bits) or 16.0 for site in sites})
    legend: dict[str, list[str]] = {}
    for bits in found:
        legend.setdefault(bits_class(bits), []).append(numbers.whole(bits))
    return [
        (name, f"{' and '.join(texts)} bits{', floating point' if name == 'b16' else ''}")
        for name, texts in legend.items()
    ]
