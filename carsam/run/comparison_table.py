"""What a comparison gives, and its table."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from carsam.evaluate.intervals import Difference

METRICS = ("segm_ap", "box_ap", "mean_iou")
FLOAT = "float"


@dataclass(frozen=True)
class Published:
    """A number from a paper, for a table of its own: other weights, data and code than those measured here.

    Attributes:
        name: As the row's.
        bits: ``w4a4``, or ``float``.
        segm_ap: COCO AP of the masks, in percent.
        source: The paper.
        model: What it was measured on.
    """

    name: str
    bits: str
    segm_ap: float
    source: str
    model: str = "SAM-B"


@dataclass(frozen=True)
class Measurement:
    """One packed model measured.

    Attributes:
        row, bits, seed: What it is.
        scores: By name, in percent.
        bytes: Of the weights file.
        seconds: Of calibration and reconstruction, also where units came from the cache.
        peak_memory: In bytes.
        notes: What sets the method's grids apart from a uniform one per tensor.
    """

    row: str
    bits: str
    seed: int
    scores: dict[str, float]
    bytes: int
    seconds: float
    peak_memory: int
    notes: str = ""


@dataclass(frozen=True)
class ComparisonResult:
    """All measurements of a comparison, the float model first, and what papers say.

    Attributes:
        floating: Scores of the float model, and the ``bytes`` of its file in FP16.
        measurements: In the order of the table.
        published: Numbers from papers.
        differences: By (bits, row), mean IoU minus the float model's, the mean over seeds; absent with one image.
        notes: What a reader of the table must know, a sentence each.
    """

    floating: dict[str, float]
    measurements: tuple[Measurement, ...]
    published: tuple[Published, ...] = ()
    differences: dict[tuple[str, str], Difference] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings, for JSON."""
        return {
            "float": self.floating,
            "measurements": [asdict(m) for m in self.measurements],
            "published": [asdict(p) for p in self.published],
            "differences": [
                {"bits": bits, "row": row, "mean_iou": difference.to_dict()}
                for (bits, row), difference in self.differences.items()
            ],
            "notes": list(self.notes),
        }

    def groups(self) -> dict[tuple[str, str], list[Measurement]]:
        """Measurements by (bits, row), over seeds, in order."""
        groups: dict[tuple[str, str], list[Measurement]] = {}
        for m in self.measurements:
            groups.setdefault((m.bits, m.row), []).append(m)
        return groups

    def to_markdown(self) -> str:
        """A table: mean ± spread (half the range) over seeds; published numbers in tables of their own below."""
        compared = bool(self.differences)
        rows = [["bits", "row", "segm AP", "box AP", "mean IoU", "to float (95 %)", "file", "calibration", "notes"]]
        floating = [f"{self.floating[key]:.1f}" for key in METRICS]
        rows.append([FLOAT, "", *floating, "", f"{self.floating['bytes'] / 1e6:.1f} MB", "", ""])
        for (bits, row), group in self.groups().items():
            scores = [mean_and_spread([m.scores[key] for m in group]) for key in METRICS]
            seconds = statistics.median(m.seconds for m in group)
            size = f"{group[0].bytes / 1e6:.1f} MB"
            difference = str(self.differences.get((bits, row), ""))
            rows.append([bits.upper(), row, *scores, difference, size, f"{seconds:.0f} s", group[0].notes])
        if not any(m.notes for m in self.measurements):
            rows = [row[:-1] for row in rows]
        if not compared:
            rows = [row[:5] + row[6:] for row in rows]
        tables = [_table(rows), *self.notes]
        for model in dict.fromkeys(p.model for p in self.published):
            rows = [["bits", "row", "segm AP", "source"]]
            for p in self.published:
                if p.model == model:
                    bits, name = (FLOAT, "") if p.bits == FLOAT else (p.bits.upper(), p.name)
                    rows.append([bits, name, f"{p.segm_ap:.1f}", p.source])
            tables += [f"published, {model}", _table(rows)]
        return "\n\n".join(tables)


def _table(rows: list[list[str]]) -> str:
    """Markdown of some rows, the first of which is the head."""
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def mean_and_spread(values: list[float]) -> str:
    """``12.3 ± 0.4``: mean and half the range; the mean alone for a single value."""
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {(max(values) - min(values)) / 2:.1f}"
