"""Reconstruction oscillation: the decoder's error stage by stage, as its units were reconstructed (METHOD.md, 10)."""

from __future__ import annotations

from typing import Any

from carsam.models.names import Names
from carsam.report import numbers
from carsam.report.charts import Dot, DotRow, Series, dot_rows, line_chart
from carsam.report.order import entries, mapping, numbers_of
from carsam.report.sections.base import Section, diagnosed
from carsam.report.source import Source

_MOST_CURVES = 7
_SHAPES = ("circle", "square", "triangle", "diamond")


def section(source: Source) -> Section:
    """The section."""
    oscillation = mapping((source.diagnosis or {}).get("oscillation"))
    stages = [str(stage) for stage in numbers_of(oscillation.get("stages"))]
    moments = [
        {**moment, "errors": [numbers.finite(e) for e in numbers_of(moment.get("errors"))]}
        for moment in entries(oscillation.get("moments"))
    ]
    final = [numbers.finite(e) for e in numbers_of(oscillation.get("errors"))]
    if not moments and final:
        moments = [{"after": "everything", "errors": final, "total_variation": oscillation.get("total_variation")}]
    view = None
    if stages and moments:
        for number, moment in enumerate(moments, 1):
            moment["number"], moment["title"] = number, _title(moment.get("after"), source.names)
        curves = _curves(moments)
        neighbours = entries(oscillation.get("neighbours"))
        view = {
            "stages": stages,
            "moments": moments,
            "curves": curves,
            "total_variation": oscillation.get("total_variation", moments[-1].get("total_variation")),
            "first_variation": moments[0].get("total_variation"),
            "worst": max(zip(stages, moments[-1]["errors"]), key=lambda pair: pair[1] or 0.0, default=None),
            "chart": _chart(stages, curves),
            "neighbours": neighbours,
            "swings": sum(1 for n in neighbours if _worse(n)),
            "neighbour_chart": _neighbour_chart(neighbours, source.names) if neighbours else None,
        }
    return diagnosed(source, "oscillation", "Oscillation", view, "errors of the decoder's stages")


def _title(after: Any, names: Names) -> str:
    after = str(after)
    return after if "." not in after else f"after {names.compact(after)}"


def _curves(moments: list[dict[str, Any]]) -> list[Series]:
    """At most seven moments, first and last among them; their colours go from the first's to the last's."""
    last = len(moments) - 1
    n = min(len(moments), _MOST_CURVES)
    chosen = sorted({round(i * last / max(1, n - 1)) for i in range(n)})
    curves = []
    for order, index in enumerate(chosen):
        moment = moments[index]
        # Seven classes for the curves; a shorter list takes the outer ones first.
        step = round(order * (_MOST_CURVES - 1) / max(1, len(chosen) - 1)) if last else _MOST_CURVES - 1
        points = [(float(x), error) for x, error in enumerate(moment["errors"], 1)]
        curves.append(
            Series(
                f"{moment['number']} {moment['title']}", points, f"moment moment-{step}", _SHAPES[order % len(_SHAPES)]
            )
        )
    return curves


def _chart(stages: list[str], curves: list[Series]) -> Any:
    words = [
        f"{curve.name}: {', '.join(numbers.number(error, 2) for _, error in curve.points)}"
        for curve in (curves[0], curves[-1])
    ]
    return line_chart(
        curves,
        name="oscillation-chart",
        title="Relative error of the decoder's stages",
        desc=f"By stage in execution order, on a logarithmic scale. {'; '.join(dict.fromkeys(words))}.",
        height=300,
        x_ticks=[(i, str(i)) for i in range(1, len(stages) + 1)],
    )


def _worse(neighbour: dict[str, Any]) -> bool:
    before, after = numbers.finite(neighbour.get("before")), numbers.finite(neighbour.get("after"))
    return before is not None and after is not None and after > before


def _neighbour_chart(neighbours: list[dict[str, Any]], names: Names) -> Any:
    rows, words = [], []
    for neighbour in neighbours:
        before, after = (numbers.finite(neighbour.get(key)) for key in ("before", "after"))
        verdict = "worse" if _worse(neighbour) else "not worse"
        values = f"{numbers.number(before, 2)} → {numbers.number(after, 2)}"
        label = f"{names.compact(neighbour.get('stage'))}, neighbour {names.compact(neighbour.get('neighbour'))}"
        words.append(f"{label}: {values}, {verdict}")
        dots = [
            Dot(before, "before", "circle", f"{label}, before: {numbers.number(before)}"),
            Dot(after, "quantized", "square", f"{label}, after: {numbers.number(after)}"),
        ]
        rows.append(DotRow(label, dots, f"{values} {'▲' if _worse(neighbour) else '▼'}", joined=True))
    return dot_rows(
        rows,
        name="oscillation-neighbours",
        title="Error of a stage before and after its neighbour was reconstructed",
        desc=f"On a logarithmic scale. {'; '.join(words)}.",
        log=True,
    )
