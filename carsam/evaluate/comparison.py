"""Comparison of methods: rows × bits × seeds, each quantized, packed, loaded back and measured.

Rows share what they have in common (finished units are cached by everything that decides them), and a comparison that
was interrupted goes on where it stopped. Only packed checkpoints are scored (METHOD.md, 11).
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import SamModel

from carsam.config import CalibrationConfig, QuantizeConfig, build
from carsam.data.calibration import CalibrationSet, calibration_set
from carsam.errors import ConfigError
from carsam.evaluate.coco_metrics import evaluate_coco, save_json
from carsam.methods.base import create
from carsam.models.load import load_model
from carsam.pack.checkpoint import folder_size
from carsam.pipeline import quantize
from carsam.reconstruct.store import code_fingerprint, fingerprint, model_fingerprint
from carsam.reconstruct.walk import Progress

METRICS = ("segm_ap", "box_ap", "mean_iou")


@dataclass(frozen=True)
class Row:
    """One row of the table: a method with settings, under a name of its own."""

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A whole table.

    Attributes:
        model: What :func:`carsam.load_model` takes.
        calibration: The calibration data; its seed is replaced by each of ``seeds``.
        coco, images: COCO file and image folder to measure on, ground-truth boxes as prompts.
        rows: Methods.
        bits: Bit-widths.
        seeds: Seeds.
    """

    model: str
    calibration: CalibrationConfig
    coco: str
    images: str
    rows: tuple[Row, ...]
    bits: tuple[str, ...] = ("w4a4",)
    seeds: tuple[int, ...] = (0,)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Comparison:
        """From the mappings of a recipe file.

        Raises:
            ConfigError: A key is missing or unknown.
        """
        missing = [key for key in ("model", "calibration", "coco", "images", "rows") if key not in values]
        if missing:
            raise ConfigError(f"the comparison lacks {missing[0]!r}.")
        if not isinstance(values["rows"], list) or not values["rows"]:
            raise ConfigError(f"rows must be a list of rows with a name and a method, not {values['rows']!r}.")
        for row in values["rows"]:
            lacking = [key for key in ("name", "method") if not isinstance(row, dict) or key not in row]
            if lacking:
                raise ConfigError(f"the row {row!r} lacks {lacking[0]!r}.")
        rows = tuple(build(Row, row, "rows.") for row in values["rows"])
        values = {**values, "rows": rows, "bits": tuple(values.get("bits", ("w4a4",)))}
        values["seeds"] = tuple(values.get("seeds", (0,)))
        comparison = build(cls, values)
        for row in rows:
            create(row.method, row.settings)
        for bits in comparison.bits:
            QuantizeConfig(bits=bits).bit_plan()
        return comparison


@dataclass(frozen=True)
class Measurement:
    """One packed model measured."""

    row: str
    bits: str
    seed: int
    scores: dict[str, float]
    bytes: int
    seconds: float
    peak_memory: int


@dataclass(frozen=True)
class ComparisonResult:
    """All measurements of a comparison, the float model first."""

    floating: dict[str, float]
    measurements: tuple[Measurement, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings, for JSON."""
        return {"float": self.floating, "measurements": [asdict(m) for m in self.measurements]}

    def groups(self) -> dict[tuple[str, str], list[Measurement]]:
        """Measurements by (bits, row), over seeds, in order."""
        groups: dict[tuple[str, str], list[Measurement]] = {}
        for m in self.measurements:
            groups.setdefault((m.bits, m.row), []).append(m)
        return groups

    def to_markdown(self) -> str:
        """A table: mean ± spread (half the range) over seeds."""
        floating = " | ".join(f"{self.floating[key]:.1f}" for key in METRICS)
        lines = [
            "| bits | row | segm AP | box AP | mean IoU | file | calibration |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            f"| float | | {floating} | {self.floating['bytes'] / 1e6:.1f} MB | |",
        ]
        for (bits, row), group in self.groups().items():
            scores = " | ".join(mean_and_spread([m.scores[key] for m in group]) for key in METRICS)
            seconds = statistics.median(m.seconds for m in group)
            lines.append(f"| {bits.upper()} | {row} | {scores} | {group[0].bytes / 1e6:.1f} MB | {seconds:.0f} s |")
        return "\n".join(lines)


def mean_and_spread(values: list[float]) -> str:
    """``12.3 ± 0.4``: mean and half the range; the mean alone for a single value."""
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {(max(values) - min(values)) / 2:.1f}"


def compare(
    comparison: Comparison,
    folder: Path,
    *,
    device: str = "cpu",
    note: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> ComparisonResult:
    """Runs a comparison; what was measured before, with the same code and settings, is not measured again.

    Args:
        comparison: Rows, bits, seeds and data.
        folder: Work folder: ``units/`` (shared units), ``rows/`` (one JSON per measurement), ``result.json``.
        device: Where to run.
        note: Told a line per measurement.
        progress: Of each quantization.

    Returns:
        All measurements; also in ``folder/result.json``.
    """
    note = note or (lambda _: None)
    model = load_model(comparison.model)
    base = (
        model_fingerprint(model),
        code_fingerprint(),
        asdict(comparison.calibration),
        comparison.coco,
        comparison.images,
    )
    floating = _cached(folder, fingerprint("float", base), lambda: _measure_float(model, comparison, device))
    note(f"float: {_scores(floating)}")

    measurements = []
    for seed in comparison.seeds:
        calibration = replace(comparison.calibration, seed=seed)
        # Read once a seed, and only where something is left to measure.
        data = functools.cache(functools.partial(calibration_set, model, **asdict(calibration)))
        for bits, row in itertools.product(comparison.bits, comparison.rows):
            config = QuantizeConfig(row.method, row.settings, bits, row.overrides, calibration)
            settings = create(row.method, row.settings).to_dict()
            key = fingerprint(base, settings, row.overrides, bits, seed)
            measure = functools.partial(_measure, comparison, config, model, data, folder, key, device, progress)
            found = _cached(folder, key, measure)
            note(f"{bits} {row.name}, seed {seed}: {_scores(found)}")
            spent = found["quantization"]
            measurements.append(
                Measurement(
                    row.name,
                    bits,
                    seed,
                    {name: found[name] for name in METRICS},
                    found["bytes"],
                    sum(unit["seconds"] for unit in spent["units"]) or spent["seconds"],
                    spent["peak_memory_bytes"],
                )
            )
    order = {(bits, row.name): i for i, (bits, row) in enumerate(itertools.product(comparison.bits, comparison.rows))}
    measurements.sort(key=lambda m: (order[m.bits, m.row], m.seed))
    result = ComparisonResult(floating, tuple(measurements))
    save_json(result.to_dict(), folder / "result.json")
    return result


def _scores(found: dict[str, Any]) -> str:
    return f"segm AP {found['segm_ap']:.1f}, box AP {found['box_ap']:.1f}, mean IoU {found['mean_iou']:.1f}"


def _measure(
    comparison: Comparison,
    config: QuantizeConfig,
    model: SamModel,
    data: Callable[[], CalibrationSet],
    folder: Path,
    key: str,
    device: str,
    progress: Progress | None,
) -> dict[str, Any]:
    """Quantizes, packs, loads back and measures one row; the packed folder does not stay."""
    out = folder / f"packed-{key[:8]}"
    result = quantize(
        model,
        data(),
        config,
        out=out,
        device=device,
        overwrite=True,
        unit_cache=folder / "units",
        progress=progress,
    )
    scores = _metrics(result.model, comparison, device)
    size = folder_size(out)
    shutil.rmtree(out)
    return {**scores, "bytes": size, "quantization": result.to_dict()}


def _metrics(model: SamModel, comparison: Comparison, device: str) -> dict[str, float]:
    scores = evaluate_coco(model, comparison.coco, comparison.images, device=device)
    return {name: getattr(scores, name) for name in METRICS}


def _measure_float(model: SamModel, comparison: Comparison, device: str) -> dict[str, Any]:
    size = 2 * sum(value.numel() for value in model.parameters())
    return {**_metrics(model, comparison, device), "bytes": size}


def _cached(folder: Path, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """``compute()``, or what an earlier run saved under the key."""
    path = folder / "rows" / f"{key[:40]}.json"
    if path.exists():
        return json.loads(path.read_text())
    found = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_json(found, path)
    return found
