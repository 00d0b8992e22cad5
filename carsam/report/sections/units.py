"""Reconstruction: errors of the units along the network, their loss curves, and compensations."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from carsam.models.names import Names
from carsam.report import numbers
from carsam.report.charts import Series, line_chart
from carsam.report.commands import quantize_command
from carsam.report.order import entries, mapping, numbers_of
from carsam.report.sections.base import Section, mean
from carsam.report.source import Source

_MOST_POINTS = 80
_WINDOW = 9
_MOST_COLUMNS = 12


def section(source: Source) -> Section:
    """The section."""
    # results.json tells of this very model; the diagnosis may carry a copy where that file is gone.
    units = entries(source.quantization.get("units")) or entries((source.diagnosis or {}).get("units"))
    compensations = entries(source.quantization.get("compensations"))
    transforms = entries(source.quantization.get("transforms"))
    if not units and not compensations and not transforms:
        title = "Reconstruction"
        if source.quantization:
            method = source.quantization_config.get("method", "The method")
            missing = f"{method} reconstructed no unit, so there are no loss curves."
            return Section("units", title, None, missing, absent="none")
        missing = "results.json does not say how the quantization went. The command that makes the folder notes it."
        return Section("units", title, None, missing, quantize_command(source))
    shown = [_unit(index, unit, source.names) for index, unit in enumerate(units, 1)]
    with_losses = [unit for unit in shown if unit["chart"]]
    view = {
        "units": shown,
        "decoder": [unit for unit in with_losses if not unit["encoder"]],
        "encoder": [unit for unit in with_losses if unit["encoder"]],
        "seconds": sum(unit["seconds"] or 0.0 for unit in shown) or None,
        "steps": sum(unit["steps"] or 0 for unit in shown),
        "chart": _depth_chart(shown) if shown else None,
        "better": sum(1 for unit in shown if _better(unit["mean_before"], unit["mean_after"])),
        "transforms": _transforms(transforms, source.names) if transforms else None,
        "compensations": [_compensation(entry) for entry in compensations if "attention" in entry],
        "conditions": [_condition(entry) for entry in compensations if "condition" in entry],
        "refits": [_refit(entry) for entry in compensations if "refitted" in entry],
    }
    return Section("units", "Reconstruction", view)


def _unit(index: int, unit: dict[str, Any], names: Names) -> dict[str, Any]:
    name = str(unit.get("unit", ""))
    before, after = ([numbers.finite(e) for e in numbers_of(unit.get(key))] for key in ("before", "after"))
    losses = [
        (numbers.finite(point[0]), numbers.finite(point[1]))
        for point in numbers_of(unit.get("losses"))
        if isinstance(point, list) and len(point) == 2
    ]
    return {
        "index": index,
        "name": name,
        "short": names.short(name),
        "compact": names.compact(name),
        "encoder": not names.in_decoder(name),
        "steps": numbers.finite(unit.get("steps")),
        "seconds": numbers.finite(unit.get("seconds")),
        "before": before,
        "after": after,
        "mean_before": mean(before),
        "mean_after": mean(after),
        "chart": _loss_chart(index, names.compact(name), losses) if len(losses) > 1 else None,
    }


def _better(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after < before


def _loss_chart(index: int, name: str, losses: list[tuple[float | None, float | None]]) -> Any:
    known = [(step, loss) for step, loss in losses if step is not None]
    every = max(1, math.ceil(len(known) / _MOST_POINTS))
    # A running median: a step sees one image, so single losses say more about the image than about the unit.
    smooth = []
    for i in range(0, len(known), every):
        reach = max(_WINDOW, 2 * every) // 2
        window = [loss for _, loss in known[max(0, i - reach) : i + reach + 1] if loss is not None]
        smooth.append((known[i][0], median(window) if window else None))
    first, last = (next((y for _, y in points if y is not None), None) for points in (smooth, smooth[::-1]))
    return line_chart(
        [Series("loss", known[::every], "raw"), Series("running median", smooth, "quantized")],
        name=f"loss-{index}",
        title=f"Loss of {name}",
        desc=f"Over {len(known)} noted steps; its running median goes from {numbers.number(first)} to "
        f"{numbers.number(last)}. Logarithmic scale.",
        height=132,
        most_ticks=3,
    )


def _depth_chart(units: list[dict[str, Any]]) -> Any:
    words = [
        f"{u['short']}: {numbers.number(u['mean_before'], 2)} to {numbers.number(u['mean_after'], 2)}" for u in units
    ]
    every = max(1, math.ceil(len(units) / 16))
    return line_chart(
        [
            Series("before", [(float(u["index"]), u["mean_before"]) for u in units], "before", "circle"),
            Series("after", [(float(u["index"]), u["mean_after"]) for u in units], "quantized", "square"),
        ],
        name="units-depth",
        title="Relative error of every unit before and after its reconstruction",
        desc=f"In execution order, on a logarithmic scale. {'; '.join(words)}.",
        height=260,
        x_ticks=[(u["index"], str(u["index"])) for u in units[::every]],
    )


def _pair(values: Any) -> list[float | None]:
    """Two numbers, before and after; unknown where there are not two."""
    found = [numbers.finite(value) for value in numbers_of(values)]
    return found if len(found) == 2 else [None, None]


def _compensation(entry: dict[str, Any]) -> dict[str, Any]:
    pairs = {key: _pair(entry.get(key)) for key in ("scores", "output")}
    branches = [f"{name} {numbers.number(value, 2)}" for name, value in mapping(entry.get("change")).items()]
    return {"attention": entry.get("attention"), **pairs, "change": ", ".join(branches)}


def _condition(entry: dict[str, Any]) -> dict[str, Any]:
    pairs = {key: _pair(entry.get(key)) for key in ("condition", "error")}
    return {"layer": entry.get("layer"), **pairs, "change": numbers.finite(entry.get("change"))}


# What was fitted, in words (:class:`carsam.compensate.refit.RefitReport`).
_FITTED = {"weights": "weights and bias", "bias": "bias alone", "none": "nothing"}


def _refit(entry: dict[str, Any]) -> dict[str, Any]:
    kind = str(entry.get("kind"))
    return {
        "layer": entry.get("refitted"),
        "fitted": _FITTED.get(kind, kind),
        "damping": numbers.finite(entry.get("damping")),
        "error": _pair(entry.get("rounded")),
        "change": numbers.finite(entry.get("change")),
        "gain": numbers.finite(entry.get("gain")),
    }


def _transforms(transforms: list[dict[str, Any]], names: Names) -> dict[str, Any]:
    """A table of what the method noted, whatever it is: every method has its own transforms."""
    keys = list(dict.fromkeys(key for transform in transforms for key in transform))[:_MOST_COLUMNS]
    return {
        "heads": [key.replace("_", " ").capitalize() for key in keys],
        "rows": [[_plain(transform.get(key), names) for key in keys] for transform in transforms],
    }


def _plain(value: Any, names: Names) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return numbers.MISSING if value is None else names.short(value)
    return numbers.whole(value)
