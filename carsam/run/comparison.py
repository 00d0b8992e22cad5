"""Comparison of methods: rows × bits × seeds, each quantized, packed, loaded back and measured.

Rows share what they have in common (finished units are cached by everything that decides them), and a comparison that
was interrupted goes on where it stopped. Only packed checkpoints are scored (METHOD.md, 11).

Processes may share a work folder, say one for each seed: every file in it appears whole, under a name that says what
it holds, so what one has finished the others read. ``result.json`` and ``table.md`` are those of the last to end; run
the whole recipe once more to gather everything.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from carsam.bits.plan import FLOATING_ENCODER
from carsam.config import CalibrationConfig, QuantizeConfig
from carsam.data.coco.ground_truth import GroundTruth
from carsam.errors import CarsamError, ConfigError
from carsam.evaluate.intervals import averaged, difference_interval
from carsam.evaluate.scores import few_objects_note
from carsam.methods.base import create
from carsam.models.load import load_model
from carsam.output.files import write_json, write_text
from carsam.prompts.calibration import CalibrationSet, calibration_set
from carsam.reading import read_json
from carsam.run.comparison_table import FLOAT, METRICS, ComparisonResult, Measurement, Published
from carsam.run.context import Progress
from carsam.run.embeddings import Embeddings
from carsam.run.measured import EvaluationData, Measured, Watch, measure, quantize_and_measure
from carsam.run.store import code_fingerprint, config_fingerprint, fingerprint, model_fingerprint, versions
from carsam.settings import build

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One row of the table: a method with settings, under a name of its own; ``decoder_only`` as for a quantization."""

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)
    decoder_only: bool = False


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
        published: Numbers from papers to print below the table.
        normalise: ``imagenet``, ``unit`` or ``min-max`` instead of the model's own normalisation.
    """

    model: str
    calibration: CalibrationConfig
    coco: str
    images: str
    rows: tuple[Row, ...]
    bits: tuple[str, ...] = ("w4a4",)
    seeds: tuple[int, ...] = (0,)
    published: tuple[Published, ...] = ()
    normalise: str | None = None

    def __post_init__(self):
        for name in ("rows", "bits", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must be a list with at least one entry.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Comparison:
        """From the mappings of a recipe file.

        Raises:
            ConfigError: A setting is missing, unknown, of another type, or out of range.
        """
        comparison = build(cls, values)
        for row in comparison.rows:
            create(row.method, row.settings)
        for bits in (*comparison.bits, *(p.bits for p in comparison.published if p.bits != FLOAT)):
            QuantizeConfig(bits=bits).bit_plan()
        return comparison


def compare(
    comparison: Comparison,
    folder: Path,
    *,
    device: str = "cpu",
    note: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    embeddings: Embeddings | None = None,
) -> ComparisonResult:
    """Runs a comparison; what was measured before, with the same code and settings, is not measured again.

    Args:
        comparison: Rows, bits, seeds and data.
        folder: Work folder: ``units/`` (shared units), ``rows/`` (one JSON per measurement), ``result.json``,
            ``table.md``.
        device: Where to run.
        note: Told a line per measurement.
        progress: Of each quantization.
        embeddings: Where the float encoder's image embeddings are kept and taken from: seeds, rows of the decoder alone
            and the float model share them. The user's cache folder if None.

    Returns:
        All measurements; also in ``folder/result.json``, and as a table in ``folder/table.md``.
    """
    note = note or (lambda _: None)
    embeddings = embeddings or Embeddings()
    model = load_model(comparison.model, normalise=comparison.normalise)
    # Contents, not paths: a file that changed at its place must be measured again.
    base = (
        model_fingerprint(model),
        config_fingerprint(model),
        code_fingerprint(scores=True),
        versions("pillow", "pycocotools"),
        _evaluation_fingerprint(comparison),
    )
    floating = _cached(folder, fingerprint(FLOAT, base), lambda: _measure_float(model, comparison, device, embeddings))
    note(f"{FLOAT}: {_scores(floating)}")

    measurements = []
    scored: dict[tuple[str, str], list[Any]] = {}
    for seed in comparison.seeds:
        calibration = replace(comparison.calibration, seed=seed)
        # Boxes of the model's own masks are found once a seed, and only where something is left to measure.
        data = functools.cache(functools.partial(_calibration_set, model, calibration, embeddings))
        chosen = _calibration_fingerprint(model, calibration)
        for bits, row in itertools.product(comparison.bits, comparison.rows):
            config = QuantizeConfig(
                row.method, row.settings, bits, row.overrides, calibration, decoder_only=row.decoder_only
            )
            method = create(row.method, row.settings)
            key = fingerprint(base, chosen, row.method, method.to_dict(), row.overrides, row.decoder_only, bits, seed)
            measure = functools.partial(
                _measure, comparison, config, model, data, folder, key, device, progress, embeddings
            )
            found = _cached(folder, key, measure)
            note(f"{bits} {row.name}, seed {seed}: {_scores(found)}")
            scored.setdefault((bits, row.name), []).append(found["per_image"])
            spent = found["quantization"]
            measurements.append(
                Measurement(
                    row.name,
                    bits,
                    seed,
                    {name: found[name] for name in METRICS},
                    found["bytes"],
                    _calibration_seconds(spent),
                    spent["peak_memory_bytes"],
                    "; ".join(note for note in (FLOATING_ENCODER if row.decoder_only else "", method.notes) if note),
                )
            )
    order = {(bits, row.name): i for i, (bits, row) in enumerate(itertools.product(comparison.bits, comparison.rows))}
    measurements.sort(key=lambda m: (order[m.bits, m.row], m.seed))
    differences = {
        key: difference
        for key, results in scored.items()
        if (difference := difference_interval(averaged(results), floating["per_image"])) is not None
    }
    note_on_ap = few_objects_note(floating["n_objects"])
    result = ComparisonResult(
        {name: floating[name] for name in (*METRICS, "bytes")},
        tuple(measurements),
        comparison.published,
        differences,
        (note_on_ap,) if note_on_ap else (),
    )
    write_json(folder / "result.json", result.to_dict())
    write_text(folder / "table.md", result.to_markdown() + "\n")
    return result


def _calibration_set(model: PreTrainedModel, calibration: CalibrationConfig, embeddings: Embeddings) -> CalibrationSet:
    with embeddings.serving(model):
        return calibration_set(model, **asdict(calibration))


def _scores(found: dict[str, Any]) -> str:
    return f"segm AP {found['segm_ap']:.1f}, box AP {found['box_ap']:.1f}, mean IoU {found['mean_iou']:.1f}"


def _measure(
    comparison: Comparison,
    config: QuantizeConfig,
    model: PreTrainedModel,
    data: Callable[[], CalibrationSet],
    folder: Path,
    key: str,
    device: str,
    progress: Progress | None,
    embeddings: Embeddings,
) -> dict[str, Any]:
    """Quantizes, packs, loads back and measures one row; the packed folder does not stay."""
    # With the process in its name: another one may be at the same row.
    out = folder / f"packed-{key[:8]}-{os.getpid()}"
    try:
        found = quantize_and_measure(
            model,
            data(),
            config,
            _evaluation(comparison),
            out,
            evaluation_device=device,
            watch=Watch(quantizing=lambda: nullcontext(progress)),
            device=device,
            overwrite=True,
            unit_cache=folder / "units",
            embeddings=embeddings,
        )
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return {**_to_dict(found), "quantization": found.quantization}


def _measure_float(
    model: PreTrainedModel, comparison: Comparison, device: str, embeddings: Embeddings
) -> dict[str, Any]:
    size = 2 * sum(value.numel() for value in model.parameters())
    return _to_dict(measure(model, _evaluation(comparison), size, device=device, embeddings=embeddings))


def _evaluation(comparison: Comparison) -> EvaluationData:
    return EvaluationData(comparison.coco, comparison.images)


def _to_dict(found: Measured) -> dict[str, Any]:
    """A measurement as a row's file keeps it."""
    scores = found.scores
    per_image = [{"name": image.name, "ious": list(image.ious)} for image in scores.per_image]
    return {
        **{name: getattr(scores, name) for name in METRICS},
        "per_image": per_image,
        "n_objects": scores.n_objects,
        "bytes": found.file_bytes,
    }


def _evaluation_fingerprint(comparison: Comparison) -> str:
    """SHA-256 of the annotation file and of all images that it names.

    Raises:
        DataError: One of them is missing or not valid.
    """
    truth = GroundTruth.from_file(comparison.coco, comparison.images)
    digest = hashlib.sha256(Path(comparison.coco).read_bytes())
    for index in range(len(truth.images)):
        with truth.image_path(index).open("rb") as file:
            for chunk in iter(functools.partial(file.read, 2**20), b""):
                digest.update(chunk)
    return digest.hexdigest()


def _calibration_fingerprint(model: PreTrainedModel, calibration: CalibrationConfig) -> list[Any]:
    """What decides the calibration set: the pixels chosen, their boxes in the annotation file, and the settings.

    Boxes of the model's own masks follow from model and pixels, so they need not be found for this.
    """
    settings = asdict(calibration)
    source = settings.pop("box_source")
    data = calibration_set(model, **settings, box_source="grid")
    return [data.fingerprint, source if calibration.coco is None else "coco", calibration.boxes_per_image]


def _calibration_seconds(spent: dict[str, Any]) -> float:
    """Seconds of calibration and reconstruction, also where units came from the cache."""
    units = sum(unit["seconds"] for unit in spent["units"])
    stages = spent.get("stages") or {}
    return units or sum(stages.get(name, 0.0) for name in ("weight grids", "ranges")) or spent["seconds"]


def _cached(folder: Path, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """``compute()``, or what an earlier run saved under the key; a damaged row is computed again, with a line."""
    path = folder / "rows" / f"{key[:40]}.json"
    if os.path.lexists(path):
        try:
            found = read_json(path, "it is measured again")
        except (CarsamError, OSError) as error:
            logger.warning("%s", error)
        else:
            if found.pop("checksum", None) == fingerprint(key, found):
                return found
            logger.warning("%s is damaged: its checksum differs; it is measured again.", path)
    found = compute()
    write_json(path, {**found, "checksum": fingerprint(key, found)})
    return found
