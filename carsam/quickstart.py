"""``make quickstart``: the embedded model at W4A4, measured beside its float original, from what the repository holds.

Needs no network and no data of its own. Everything lands in ``runs/quickstart``: the packed folder ``quantized``,
``overlays`` of some evaluation images, ``results.json``, and ``report.html``, which shows all of it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from carsam.commands.common import (
    RESULTS,
    duration,
    err,
    errors_for_people,
    megabytes,
    merge_results,
    out,
    show_warnings,
    writing,
)
from carsam.commands.progress import Reporter, shown
from carsam.errors import DataError

if TYPE_CHECKING:
    from transformers import SamModel

    from carsam.config import QuantizeConfig

ROOT = Path(__file__).resolve().parents[1]
N_OVERLAYS = 4
REPORT = "report.html"
# Of the 25 embedded calibration images, one has no object of a usable size.
N_IMAGES = 24


@dataclass(frozen=True)
class Row:
    """One line of the closing table.

    Attributes:
        model: What was measured.
        segm_ap, box_ap, mean_iou: In percent.
        file_bytes: Size of the weights file.
        quantize_seconds: None for the float model.
        evaluate_seconds: Wall-clock time of the evaluation.
        peak_memory_bytes: Of the process up to the end of the evaluation (float) or of the quantization (W4A4).
    """

    model: str
    segm_ap: float
    box_ap: float
    mean_iou: float
    file_bytes: int
    quantize_seconds: float | None
    evaluate_seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Sample:
    """The embedded model and images.

    Attributes:
        model: transformers folder.
        calibration, evaluation: Folders with ``images`` and ``instances.json``.
    """

    model: Path
    calibration: Path
    evaluation: Path

    @classmethod
    def embedded(cls, root: Path = ROOT) -> Sample:
        """What the repository holds.

        Raises:
            DataError: This carsam was installed without its repository.
        """
        base = root / "embedded"
        sample = cls(base / "sam-nano-256", base / "images" / "calibration", base / "images" / "evaluation")
        missing = [str(path) for path in asdict(sample).values() if not path.is_dir()]
        if missing:
            raise DataError(f"the quick start needs carsam's repository: there is no {missing[0]}.")
        return sample


def default_config(sample: Sample) -> QuantizeConfig:
    """CAR-SAM at W4A4 on the calibration images, with the boxes of their COCO file."""
    from carsam.config import CalibrationConfig, QuantizeConfig

    images = sample.calibration / "images"
    data = CalibrationConfig(
        images=_relative(images),
        coco=_relative(sample.calibration / "instances.json"),
        n_images=N_IMAGES,
    )
    return QuantizeConfig(calibration=data)


def quickstart(sample: Sample, folder: Path, config: QuantizeConfig, *, limit: int | None = None) -> list[Row]:
    """Quantizes, evaluates both models, draws overlays, and prints the table.

    Args:
        sample: Model and images.
        folder: Where everything goes; an earlier quick start's files there are replaced.
        config: Of the quantization.
        limit: Only the first evaluation images.

    Returns:
        The table's rows.

    Raises:
        CarsamError: The sample is damaged, or the disk is full.
    """
    import torch

    from carsam.files import write_json
    from carsam.models.load import load_model
    from carsam.pack.checkpoint import folder_size
    from carsam.pipeline import quantize

    # A run that fails half-way must not leave an older run's results beside its own files.
    for stale in (folder / RESULTS, folder / "overlays", folder / REPORT):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
    float_model = load_model(sample.model)
    config.bit_plan()
    name = config.bits.upper()

    row, float_scores = _measured("float (FP16 file)", float_model, sample, limit, folder_size(sample.model))
    rows = [row]
    with shown(f"quantizing {_relative(sample.model)} to {name} with {config.method}") as progress:
        result = quantize(
            _relative(sample.model),
            config.calibration.images,
            config,
            out=folder / "quantized",
            overwrite=True,
            progress=progress,
        )
    packed = result.model
    size = folder_size(folder / "quantized")
    row, scores = _measured(name, packed, sample, limit, size, (result.seconds, result.peak_memory))
    rows.append(row)
    merge_results(folder / "quantized", quantization=result.to_dict(), evaluation=scores, float_evaluation=float_scores)
    draw_overlays({"float": float_model, name: packed}, sample, folder / "overlays", limit=limit)
    write_page(sample, folder, limit)

    path = folder / RESULTS
    values = {"rows": [asdict(row) for row in rows], "threads": torch.get_num_threads(), "torch": torch.__version__}
    write_json(path, values)
    _print_table(rows, folder)
    return rows


def _measured(
    title: str,
    model: SamModel,
    sample: Sample,
    limit: int | None,
    file_bytes: int,
    quantization: tuple[float, int] | None = None,
) -> tuple[Row, dict[str, Any]]:
    """A line of the table, and the scores as ``carsam evaluate`` notes them."""
    from carsam.evaluate.coco_metrics import evaluate_coco
    from carsam.measure import peak_memory

    started = time.perf_counter()
    coco, images = sample.evaluation / "instances.json", sample.evaluation / "images"
    with Reporter(f"evaluating {title}") as reporter:
        scores = evaluate_coco(model, coco, images, limit=limit, progress=reporter.images)
    seconds, peak = quantization or (None, peak_memory())
    elapsed = time.perf_counter() - started
    row = Row(title, scores.segm_ap, scores.box_ap, scores.mean_iou, file_bytes, seconds, elapsed, peak)
    noted = {"coco": _relative(coco), "images": _relative(images), "boxes": None, "limit": limit}
    return row, {**noted, **scores.to_dict(), "seconds": round(elapsed, 2)}


def write_page(sample: Sample, folder: Path, limit: int | None) -> None:
    """Diagnoses the packed model and writes the page that shows everything; without sensitivities, for speed.

    Args:
        sample: Model and images.
        folder: The quick start's.
        limit: Only the first evaluation images.

    Raises:
        CarsamError: The folder cannot be written.
    """
    from carsam.diagnose.run import N_IMAGES as DIAGNOSED
    from carsam.diagnose.run import diagnose
    from carsam.report.page import write_report

    err.print("writing the report")
    diagnose(
        _relative(sample.model),
        _relative(folder / "quantized"),
        _relative(sample.evaluation / "images"),
        coco=_relative(sample.evaluation / "instances.json"),
        limit=limit or DIAGNOSED,
        with_sensitivity=False,
    )
    write_report(folder / "quantized", folder / REPORT, None)


def draw_overlays(
    models: dict[str, SamModel], sample: Sample, folder: Path, *, limit: int | None = None, count: int = N_OVERLAYS
) -> None:
    """Draws image, float masks and quantized masks side by side for some evaluation images.

    Args:
        models: By title.
        sample: Whose evaluation images are drawn.
        folder: Where to; one PNG an image.
        limit: Choose from the first evaluation images only.
        count: Images to draw: those with the most objects.

    Raises:
        CarsamError: The folder cannot be written.
    """
    from carsam.data.coco import CocoInstances, clean_boxes
    from carsam.evaluate.overlay import comparison
    from carsam.evaluate.points import mask_iou

    instances = CocoInstances.from_file(sample.evaluation / "instances.json")
    images = sorted(instances.images[:limit], key=lambda image: -len(instances.instances(image.id)))[:count]
    err.print(f"drawing {len(images)} overlays")
    for image in images:
        pixels = instances.read_image(image, sample.evaluation / "images")
        truth = instances.masks(image.id)
        boxes, dropped = clean_boxes(instances.boxes(image.id), image.size)
        if not len(boxes):
            continue
        panels = []
        for title, model in models.items():
            masks = _masks(model, pixels, boxes)
            # With a box dropped, masks and objects no longer pair up by position: then no IoU is shown.
            ious: Sequence[float] = [] if dropped else [mask_iou(m, t) for m, t in zip(masks, truth)]
            panels.append((title, masks, sum(ious) / len(ious) if ious else None))
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            comparison(pixels, panels, boxes).save(folder / f"{Path(image.file_name).stem}.png")


def _masks(model: SamModel, pixels: Any, boxes: Any) -> Any:
    """Masks ``(N, H, W)`` bool of an image for boxes ``(N, 4)`` in its pixels."""
    import numpy as np

    from carsam.predictor import SamPredictor

    predictor = SamPredictor(model)
    predictor.set_image(pixels)
    return np.stack([predictor.predict(box=box, multimask_output=False)[0][0] for box in boxes])


def _print_table(rows: list[Row], folder: Path) -> None:
    table = Table("model", title="Quick start: sam-nano-256 on the embedded evaluation images", title_justify="left")
    for heading in ("segm AP", "mean IoU", "box AP", "file", "quantize", "evaluate", "peak memory"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.model,
            f"{row.segm_ap:.1f}",
            f"{row.mean_iou:.1f}",
            f"{row.box_ap:.1f}",
            megabytes(row.file_bytes),
            "-" if row.quantize_seconds is None else duration(row.quantize_seconds),
            duration(row.evaluate_seconds),
            megabytes(row.peak_memory_bytes),
        )
    out.print()
    out.print(table)
    for name, title in {
        "quantized": "packed model",
        "overlays": "overlays",
        RESULTS: "results",
        REPORT: "report",
    }.items():
        out.print(f"{title:<13} {_relative(folder / name)}", markup=False, soft_wrap=True)


def _relative(path: Path) -> str:
    """The path from the current folder where that is shorter: recipes then fit every checkout."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main() -> None:
    """Runs the quick start in the repository that this package lies in."""
    with errors_for_people():
        show_warnings()
        sample = Sample.embedded()
        quickstart(sample, ROOT / "runs" / "quickstart", default_config(sample))


if __name__ == "__main__":
    app()
