"""What the charts are drawn with: SVG elements, scales and ticks.

Across, charts are laid out in percent of their width, and down in pixels: text keeps its size at every width, and a
chart fits a phone without a second version. Curves lie in a nested SVG that is stretched, with strokes that are not.
Colours are classes of the style sheet, so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from carsam.report.numbers import number

# Around a marker's centre, about as large as each other; hollow and filled, so that colour is not needed.
_MARKERS = {
    "circle": '<circle r="4.5"/>',
    "square": '<rect x="-4" y="-4" width="8" height="8"/>',
    "diamond": '<path d="M0-5.5 5.5 0 0 5.5-5.5 0z"/>',
    "triangle": '<path d="M0-5 5 4h-10z"/>',
    "tick": '<path d="M0-4V4"/>',
}


def element(tag: str, content: str | Markup = "", /, **attributes: object) -> Markup:
    """An element; attributes are escaped, ``class_`` stands for ``class``, ``a_b`` for ``a-b``, None for absence."""
    parts = [tag]
    for key, value in attributes.items():
        if value is not None:
            name = "class" if key == "class_" else "viewBox" if key == "viewBox" else key.replace("_", "-")
            parts.append(f'{name}="{escape(str(value))}"')
    return Markup(f"<{' '.join(parts)}>{escape(content)}</{tag}>")


def join(parts: Iterable[Markup]) -> Markup:
    """Elements one after the other."""
    return Markup("".join(parts))


def percent(value: float) -> str:
    """A coordinate across."""
    return f"{value:.2f}".rstrip("0").rstrip(".") + "%"


def drawing(name: str, title: str, desc: str, height: float, content: Markup, *, class_: str = "") -> Markup:
    """The outer SVG: as wide as its place, named and described for those who do not see it.

    Args:
        name: Makes the ids of title and description; unique in the page.
        title: Names the chart.
        desc: Says what it shows.
        height: In pixels.
        content: What is drawn.
        class_: Further classes.
    """
    head = element("title", title, id=f"{name}-title") + element("desc", desc, id=f"{name}-desc")
    return element(
        "svg",
        head + content,
        class_=f"chart {class_}".strip(),
        role="img",
        aria_labelledby=f"{name}-title",
        aria_describedby=f"{name}-desc",
        width="100%",
        height=f"{height:g}",
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line; x in percent."""
    return element("line", x1=percent(x1), y1=f"{y1:g}", x2=percent(x2), y2=f"{y2:g}", class_=class_)


def text(x: float, y: float, content: str, class_: str = "", *, anchor: str = "start", dx: float = 0) -> Markup:
    """Text; x in percent, ``dx`` in pixels."""
    return element(
        "text",
        content,
        x=percent(x),
        y=f"{y:g}",
        dx=f"{dx:g}" if dx else None,
        class_=class_ or None,
        text_anchor=None if anchor == "start" else anchor,
    )


def marker(x: float, y: float, class_: str, shape: str = "circle", title: str = "") -> Markup:
    """A marker with its centre at (x percent, y pixels)."""
    inner = Markup(_MARKERS[shape]) + (element("title", title) if title else Markup(""))
    return element("svg", inner, x=percent(x), y=f"{y:g}", overflow="visible", class_=f"marker {class_}")


def stretched(x: float, y: float, width: float, height: float, content: Markup, view: str) -> Markup:
    """A nested SVG whose content is stretched to its place; strokes keep their width."""
    return element(
        "svg",
        content,
        x=percent(x),
        y=f"{y:g}",
        width=percent(width),
        height=f"{height:g}",
        viewBox=view,
        preserveAspectRatio="none",
        overflow="visible",
    )


# Beyond these a number is no measurement, and arithmetic on scales would overflow.
_SMALLEST, _LARGEST = 1e-30, 1e30


def can_show(value: float | None, log: bool = False) -> bool:
    """Whether a value has a place on a scale."""
    if value is None or not math.isfinite(value) or abs(value) > _LARGEST:
        return False
    return value >= _SMALLEST if log else True


@dataclass(frozen=True)
class Scale:
    """Maps values to 0..1, linearly or by logarithm."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float | None], *, log: bool = False, zero: bool = False) -> Scale | None:
        """A scale that holds all values that it can show; None where there are none.

        Args:
            values: Data; None, NaN and infinite ones do not count, nor zero and what is below it if ``log``.
            log: By logarithm.
            zero: Hold zero as well (linear scales).
        """
        shown = [v for v in values if can_show(v, log)]
        if not shown:
            return None
        low, high = min(shown), max(shown)
        if log:
            # At least a factor of two: noise in the third digit must not fill the chart.
            middle = math.sqrt(low) * math.sqrt(high)
            low, high = min(low, middle / math.sqrt(2)), max(high, middle * math.sqrt(2))
            return cls(low, high, True)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        return cls(low, high)

    def padded(self, share: float) -> Scale:
        """With room on both sides, as a share of the scale."""
        if self.log:
            factor = (self.high / self.low) ** share
            return Scale(self.low / factor, self.high * factor, True)
        room = share * (self.high - self.low)
        return Scale(self.low - room, self.high + room)

    def __call__(self, value: float | None) -> float | None:
        """0..1 within the scale; None where the value cannot be shown."""
        if not can_show(value, self.log):
            return None
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            return (math.log(value) - low) / (high - low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 5) -> list[tuple[float, str]]:
        """Round values within the scale, with their text, at most about ``most``."""
        if self.log:
            return [(value, number(value, 1)) for value in self._log_ticks(most)]
        values = self._linear_ticks(most)
        step = values[1] - values[0] if len(values) > 1 else 1.0
        places = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
        if places > 6 or max(abs(self.low), abs(self.high)) >= 1e6:
            return [(value, number(value, 2)) for value in values]
        return [(value, f"{value:.{places}f}".replace("-", "−")) for value in values]

    def _log_ticks(self, most: int) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        low, high = self.low * (1 - 1e-9), self.high * (1 + 1e-9)
        # From fine to coarse, the first that is not too many: 1 2 5 10, 1 3 10, 1 10, then every nth power.
        for multiples in ((1, 2, 5), (1, 3), (1,)):
            steps = [m * 10.0**power for power in range(first, last + 1) for m in multiples]
            steps = [step for step in steps if low <= step <= high]
            if len(steps) <= most:
                return steps
        return steps[:: math.ceil(len(steps) / most)]

    def _linear_ticks(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def runs(points: Sequence[tuple[float | None, float | None]]) -> list[list[tuple[float, float]]]:
    """Points in unbroken runs: a curve has a gap where a value cannot be shown."""
    found: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if x is None or y is None:
            found.append([])
        else:
            found[-1].append((x, y))
    return [run for run in found if run]
