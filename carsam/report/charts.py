"""The report's charts: pure functions from values to inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from carsam.report.numbers import count, whole
from carsam.report.svg import (
    Scale,
    can_show,
    drawing,
    element,
    join,
    line,
    marker,
    percent,
    runs,
    stretched,
    text,
)

Point = tuple[float | None, float | None]


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: For the legend.
        points: (x, y); a point without a value is a gap.
        kind: Class that gives colour, width and dashes.
        shape: Marker at the points; none if empty.
        end: Text at its last point.
    """

    name: str
    points: Sequence[Point]
    kind: str
    shape: str = ""
    end: str = ""


@dataclass(frozen=True)
class Dot:
    """A value on a row of :func:`dot_rows`."""

    value: float | None
    kind: str
    shape: str = "circle"
    title: str = ""


@dataclass(frozen=True)
class DotRow:
    """A row of :func:`dot_rows`: label above its line, value as text at the right, dots on the line."""

    label: str
    dots: Sequence[Dot]
    text: str = ""
    joined: bool = False


@dataclass(frozen=True)
class BarRow:
    """A row of :func:`bar_rows`: label and text above, a bar for each (value, class)."""

    label: str
    text: str
    bars: Sequence[tuple[float | None, str]]


@dataclass(frozen=True)
class Cell:
    """A site in :func:`bit_map`.

    Attributes:
        layer, part: Its headings: the layer and ``in``, ``w``, ``Q``, …
        weight: Weights (a square) or an activation (rounded).
        bits: None where it is not known.
        error: Drawn as a bar below the cell; None for no bar.
        title: All of it in words.
    """

    layer: str
    part: str
    weight: bool
    bits: float | None
    error: float | None
    title: str


@dataclass(frozen=True)
class MapRow:
    """A block, attention or MLP in :func:`bit_map`."""

    label: str
    cells: Sequence[Cell] = field(default_factory=list)


_LEFT = 12.0  # Percent: curves start after the numbers that stand on the grid lines.
_RIGHT = 97.0


def line_chart(
    series: Sequence[Series],
    *,
    name: str,
    title: str,
    desc: str,
    log: bool = True,
    height: int = 260,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    most_ticks: int = 5,
) -> Markup:
    """Curves over a common axis, on a logarithmic or linear scale.

    Args:
        series: Curves; later ones lie on top.
        name: Makes ids; unique in the page.
        title, desc: For those who do not see it.
        log: Logarithmic scale of the values.
        height: In pixels.
        x_ticks: (x, text); round numbers where there are none.
        most_ticks: Numbers along an axis, about.
    """
    across = Scale.around([x for s in series for x, y in s.points if y is not None])
    up = Scale.around([y for s in series for _, y in s.points], log=log)
    if across is None or up is None:
        return _nothing(name, title, desc)
    up = up.padded(0.06)
    top, bottom = 18, height - 26
    parts = []
    for value, label in up.ticks(most_ticks):
        y = bottom - (bottom - top) * (up(value) or 0.0)
        parts += [line(0, y, 100, y, "grid"), text(0, y - 4, label, "tick")]
    parts.append(line(0, bottom, 100, bottom, "axis"))
    for value, label in x_ticks if x_ticks is not None else across.ticks(most_ticks):
        x = _LEFT + (_RIGHT - _LEFT) * (across(value) or 0.0)
        parts.append(text(x, height - 8, label, "tick", anchor="middle"))

    curves, markers = [], []
    for s in series:
        placed = [(across(x), up(y)) for x, y in s.points]
        for run in runs(placed):
            points = " ".join(f"{1000 * x:.1f},{100 * (1 - y):.2f}" for x, y in run)
            curves.append(
                element("polyline", points=points, class_=f"curve {s.kind}", vector_effect="non-scaling-stroke")
            )
        spots = [(x, y) for x, y in placed if x is not None and y is not None]
        for x, y in spots if s.shape else []:
            markers.append(marker(_LEFT + (_RIGHT - _LEFT) * x, bottom - (bottom - top) * y, s.kind, s.shape))
        if s.end and spots:
            x, y = spots[-1]
            markers.append(text(_LEFT + (_RIGHT - _LEFT) * x, bottom - (bottom - top) * y + 4, s.end, "end", dx=8))
    parts.append(stretched(_LEFT, top, _RIGHT - _LEFT, bottom - top, join(curves), "0 0 1000 100"))
    return drawing(name, title, desc, height, join(parts + markers))


def dot_rows(
    rows: Sequence[DotRow],
    *,
    name: str,
    title: str,
    desc: str,
    log: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> Markup:
    """A ranking or a comparison: a row per item, its values as dots on a common scale.

    Args:
        rows: From top to bottom.
        name: Makes ids; unique in the page.
        title, desc: For those who do not see it.
        log: Logarithmic scale.
        low, high: Ends of the scale; those of the values where not given.
    """
    values = [dot.value for row in rows for dot in row.dots]
    scale = Scale.around([*values, low, high], log=log)
    if scale is None or not any(scale(value) is not None for value in values):
        return _nothing(name, title, desc)
    step, head = 36, 4
    height = head + step * len(rows) + 22
    bottom = height - 22

    def at(value: float | None) -> float | None:
        share = scale(value)
        return None if share is None else 1.5 + 97 * min(max(share, 0.0), 1.0)

    parts = []
    for value, label in scale.ticks(6):
        x = at(value) or 0.0
        anchor = "start" if x < 4 else "end" if x > 96 else "middle"
        parts += [line(x, head, x, bottom, "grid"), text(x, height - 6, label, "tick", anchor=anchor)]
    for index, row in enumerate(rows):
        y = head + step * index
        track = y + 25
        parts += [line(0, track, 100, track, "track"), text(0, y + 13, row.label, "label halo")]
        if row.text:
            parts.append(text(100, y + 13, row.text, "value halo", anchor="end"))
        placed = [(at(dot.value), dot) for dot in row.dots]
        spots = [x for x, dot in placed if x is not None and dot.shape != "tick"]
        if row.joined and len(spots) > 1:
            parts.append(line(min(spots), track, max(spots), track, "joint"))
        parts += [marker(x, track, dot.kind, dot.shape, dot.title) for x, dot in placed if x is not None]
    return drawing(name, title, desc, height, join(parts))


def bar_rows(rows: Sequence[BarRow], *, name: str, title: str, desc: str) -> Markup:
    """Horizontal bars from zero on a common scale, those of a row next to each other."""
    values = [value for row in rows for value, _ in row.bars if can_show(value)]
    largest = max(values, default=0.0)
    if largest <= 0:
        return _nothing(name, title, desc)
    parts, y = [], 0
    for row in rows:
        parts += [text(0, y + 13, row.label, "label"), text(100, y + 13, row.text, "value", anchor="end")]
        y += 19
        for value, kind in row.bars:
            parts.append(element("rect", x=0, y=y, width="100%", height=9, class_="groove"))
            if can_show(value) and value > 0:
                width = percent(100 * value / largest)
                parts.append(element("rect", x=0, y=y, width=width, height=9, class_=f"bar {kind}"))
            y += 11
        y += 12
    return drawing(name, title, desc, y, join(parts))


def columns(counts: Sequence[float], low: float, high: float, *, name: str, title: str, desc: str) -> Markup:
    """A histogram with an axis, for few wide bins."""
    scale, largest = Scale(low, high), max(counts, default=0)
    if not largest or not low < high:
        return _nothing(name, title, desc)
    height, bottom = 150, 124
    width = 100 / len(counts)
    parts = [line(0, bottom, 100, bottom, "axis")]
    for index, value in enumerate(counts):
        if value > 0:
            tall = 104 * value / largest
            x, wide = percent(index * width + 0.25), percent(width - 0.5)
            parts.append(
                element("rect", x=x, y=f"{bottom - tall:.1f}", width=wide, height=f"{tall:.1f}", class_="bar quantized")
            )
            centre = (index + 0.5) * width
            parts.append(text(centre, bottom - tall - 4, count(value), "tick", anchor="middle"))
    for value, label in scale.ticks(5):
        x = 100 * (scale(value) or 0.0)
        parts.append(text(x, height - 8, label, "tick", anchor="start" if x < 3 else "end" if x > 97 else "middle"))
    return drawing(name, title, desc, height, join(parts))


def histogram(
    counts: Sequence[float | None],
    low: float | None,
    high: float | None,
    *,
    title: str,
    grid_low: float | None = None,
    grid_high: float | None = None,
) -> Markup:
    """A histogram small enough for a table's cell; heights by log(1 + count), so that tails show.

    Args:
        counts: Per bin.
        low, high: Ends of the bins.
        title: For those who do not see it.
        grid_low, grid_high: Range of the quantizer: what lies outside it is shaded.
    """
    heights = [math.log1p(c) if c is not None and math.isfinite(c) and c > 0 else 0.0 for c in counts]
    largest = max(heights, default=0.0)
    if not largest or low is None or high is None or not low < high:
        return Markup("")
    # One path of steps: 64 rectangles times 350 sites would be most of the file.
    path = "M0 24"
    for index, tall in enumerate(heights):
        path += f"V{24 - 23 * tall / largest:.1f}H{index + 1}".replace(".0H", "H")
    parts = [element("title", title), element("path", d=f"{path}V24z", class_="area")]
    bins, spread = len(heights), high - low
    for edge, outside in ((grid_low, "low"), (grid_high, "high")):
        if edge is None or not math.isfinite(edge) or not low < edge < high:
            continue
        x = bins * (edge - low) / spread
        start, wide = (0.0, x) if outside == "low" else (x, bins - x)
        parts.append(element("rect", x=f"{start:.1f}", y=0, width=f"{wide:.1f}", height=24, class_="outside"))
        parts.append(element("path", d=f"M{x:.1f} 0V24", class_="edge", vector_effect="non-scaling-stroke"))
    return element(
        "svg",
        join(parts),
        class_="chart histogram",
        role="img",
        width=160,
        height=30,
        viewBox=f"0 0 {bins} 24",
        preserveAspectRatio="none",
    )


_LABEL = 21.0  # Percent, for the names of rows.
_MAP_COLUMNS = 12


def bit_map(rows: Sequence[MapRow], *, name: str, title: str, desc: str) -> Markup:
    """The network by site: a row per block, a cell per site in execution order, its bits in it, its error below.

    Args:
        rows: In execution order.
        name: Makes ids; unique in the page.
        title, desc: For those who do not see it.
    """
    most = max([_MAP_COLUMNS, *(len(row.cells) for row in rows)])
    width = (100 - _LABEL) / most
    errors = error_scale([cell.error for row in rows for cell in row.cells])
    parts: list[Markup] = []
    y, headings = 0.0, None
    for row in rows:
        signature = [(cell.layer, cell.part) for cell in row.cells]
        if signature != headings:
            y += 4 if headings else 0
            parts += _map_headings(signature, width, y)
            y, headings = y + 30, signature
        parts.append(text(0, y + 15, row.label, "label"))
        for index, cell in enumerate(row.cells):
            parts.append(_map_cell(cell, _LABEL + width * index, width, y, errors))
        y += 30
    return drawing(name, title, desc, y, join(parts), class_="map")


def error_scale(errors: Sequence[float | None]) -> Scale | None:
    """The scale of the bars below the cells: six powers of ten at most, or the differences that count would vanish."""
    scale = Scale.around(errors, log=True)
    return scale and Scale(max(scale.low, scale.high * 1e-6), scale.high, True)


def _map_headings(signature: Sequence[tuple[str, str]], width: float, y: float) -> list[Markup]:
    """The layer over its cells, and what each cell is."""
    parts, start = [], 0
    for index, (layer, part) in enumerate(signature):
        x = _LABEL + width * index
        parts.append(text(x + width / 2, y + 25, part, "tick", anchor="middle"))
        if index + 1 == len(signature) or signature[index + 1][0] != layer:
            left, right = _LABEL + width * start + 0.3, x + width - 0.3
            parts.append(text((left + right) / 2, y + 10, layer, "tick", anchor="middle"))
            parts.append(line(left, y + 14, right, y + 14, "axis"))
            start = index + 1
    return parts


def _map_cell(cell: Cell, x: float, width: float, y: float, errors: Scale | None) -> Markup:
    left, wide = percent(x + 0.25), width - 0.5
    label = whole(cell.bits) if cell.bits is not None else "?"
    parts = [
        element("title", cell.title),
        element("rect", x=left, y=f"{y:g}", width=percent(wide), height=20, rx=1 if cell.weight else 9),
        text(x + width / 2, y + 14.5, label, anchor="middle"),
    ]
    share = errors(cell.error) if errors is not None else None
    if share is not None:
        # The smallest error still shows as a dot of a bar: none at all means that it was not measured.
        length = percent(wide * (0.06 + 0.94 * min(max(share, 0.0), 1.0)))
        parts.append(element("rect", x=left, y=f"{y + 22:g}", width=length, height=3, class_="error"))
    return element("g", join(parts), class_=f"cell {bits_class(cell.bits)}")


def bits_class(bits: float | None) -> str:
    """The class that colours a bit-width."""
    if bits is None or not math.isfinite(bits) or bits > 8:
        return "b16"
    return "b3" if bits < 4 else "b4" if bits < 5 else "b6" if bits < 7 else "b8"


def _nothing(name: str, title: str, desc: str) -> Markup:
    return drawing(name, title, desc, 40, text(0, 24, "No value here can be drawn.", "tick"))


def swatch(kind: str, shape: str = "", *, curve: bool = True) -> Markup:
    """A curve's or dot's look, for a legend; the text beside it says what it is."""
    parts = [line(0, 8, 100, 8, f"curve {kind}")] if curve else []
    if kind.startswith("bar "):
        parts = [element("rect", x=0, y=4, width=16, height=9, class_=kind)]
    parts += [marker(50, 8, kind, shape)] if shape else []
    return element("svg", join(parts), class_="chart swatch", aria_hidden="true", width=34 if curve else 16, height=16)
