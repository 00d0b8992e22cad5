"""Sensitivity: sites ranked by what quantizing each of them alone does to the masks."""

from __future__ import annotations

from typing import Any

from carsam.models.names import Names
from carsam.report import numbers
from carsam.report.charts import Dot, DotRow, dot_rows
from carsam.report.order import entries
from carsam.report.sections.base import Section, diagnosed, percent
from carsam.report.source import Source

_TOP = 15


def section(source: Source) -> Section:
    """The section."""
    ranking = [_entry(entry, source.names) for entry in entries((source.diagnosis or {}).get("sensitivity"))]
    ranking.sort(key=lambda entry: -(entry["error"] if entry["error"] is not None else -1.0))
    view = None
    if ranking:
        errors = [entry["error"] for entry in ranking if entry["error"] is not None]
        kinds = [entry["kind"] for entry in ranking[:_TOP]]
        view = {
            "ranking": ranking,
            "top": ranking[:_TOP],
            "shares": {kind: kinds.count(kind) for kind in ("weight", "activation")},
            "largest": ranking[0] if errors else None,
            "decoder": sum(1 for entry in ranking[:_TOP] if source.names.in_decoder(entry["site"])),
            "chart": _chart(ranking[:_TOP], source.names),
        }
    return diagnosed(source, "sensitivity", "Sensitivity", view, "sensitivities of single sites")


def _entry(entry: dict[str, Any], names: Names) -> dict[str, Any]:
    site, kind = str(entry.get("site", "")), str(entry.get("kind", ""))
    return {
        "site": site,
        "short": names.short(site),
        "kind": kind,
        "words": "weights" if kind == "weight" else "activation",
        "bits": entry.get("bits"),
        "error": numbers.finite(entry.get("error")),
        "iou": percent(entry.get("iou")),
    }


def _chart(top: list[dict[str, Any]], names: Names) -> Any:
    rows = []
    for entry in top:
        weight = entry["kind"] == "weight"
        dot = Dot(entry["error"], "weight" if weight else "activation", "square" if weight else "circle")
        rows.append(DotRow(names.compact(entry["site"]), [dot], numbers.number(entry["error"], 2)))
    words = "; ".join(f"{entry['short']}, {entry['words']}: {numbers.number(entry['error'], 2)}" for entry in top)
    return dot_rows(
        rows,
        name="sensitivity-chart",
        title=f"The {len(top)} most sensitive sites",
        desc=f"Relative squared error of the mask logits, on a logarithmic scale. {words}.",
        log=True,
    )
