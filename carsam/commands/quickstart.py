"""``make quickstart``: the embedded model at W4A4, measured beside its float original, from what the repository holds.

Needs no network and no data of its own. Everything lands in ``runs/quickstart``: the packed folder ``quantized``,
``overlays`` of some evaluation images, ``results.json``, and ``report.html``, which shows all of it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
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
    from carsam.evaluate.intervals import Difference
    from carsam.evaluate.scores import CocoResult

ROOT = Path(__file__).resolve().parents[2]
N_OVERLAYS = 4
REPORT = "report.html"
# Of the 25 embedded calibration images, one has no object of a usable size.
N_IMAGES = 24


@dataclass(frozen=True)
class Row:
    """One line of the closing table.

    Attributes:
        model: What was measured.
        mean_iou, segm_ap, box_ap: In percent.
        mean_iou_interval: Its 95 % interval over images; None with fewer than two.
        difference: Mean IoU minus the float model's, with the interval of the paired difference; None for that model.
        n_objects: Objects that the APs rest on.
        file_bytes: Size of the weights file.
        quantize_seconds: None for the float model.
        evaluate_seconds: Wall-clock time of the evaluation.
        peak_memory_bytes: Of the process up to the end of the evaluation (float) or of the quantization (W4A4).
    """

    model: str
    mean_iou: float
    mean_iou_interval: tuple[float, float] | None
    difference: Difference | None
    segm_ap: float
    box_ap: float
    n_objects: int | None
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

    from carsam.evaluate.intervals import difference_interval
    from carsam.models.load import load_model
    from carsam.output.files import write_json
    from carsam.pack.checkpoint import folder_size
    from carsam.pipeline import quantize

    # A run that fails half-way must not leave an older run's results beside its own files.
    for stale in (folder / RESULTS, folder / "overlays", folder / REPORT):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
    float_model = load_model(sample.model)
    config.bit_plan()
    name = config.bits.upper()

    row, floating = _measured("float (FP16 file)", float_model, sample, limit, folder_size(sample.model))
    rows = [row]
    with shown(f"quantizing {_relative(sample.model)} to {name} with {config.method}") as progress:
        result = quantize(
            _relative(sample.model),
            config.calibration.images,
            config,
            out=folder / "quantized",
            restart=True,  # make has no flag for what an interrupted quick start left
            overwrite=True,
            progress=progress,
        )
    packed = result.model
    size = folder_size(folder / "quantized")
    row, scores = _measured(name, packed, sample, limit, size, (result.seconds, result.peak_memory))
    rows.append(replace(row, difference=difference_interval(scores.per_image, floating.per_image)))
    merge_results(
        folder / "quantized",
        quantization=result.to_dict(),
        evaluation=_noted(rows[1], scores, sample, limit),
        float_evaluation=_noted(rows[0], floating, sample, limit),
    )
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
) -> tuple[Row, CocoResult]:
    """A line of the table, and all scores."""
    from carsam.evaluate.coco_metrics import evaluate_coco
    from carsam.run.memory import peak_memory

    started = time.perf_counter()
    with Reporter(f"evaluating {title}") as reporter:
        scores = evaluate_coco(
            model,
            sample.evaluation / "instances.json",
            sample.evaluation / "images",
            limit=limit,
            progress=reporter.images,
        )
    seconds, peak = quantization or (None, peak_memory())
    row = Row(
        title,
        mean_iou=scores.mean_iou,
        mean_iou_interval=scores.mean_iou_interval,
        difference=None,
        segm_ap=scores.segm_ap,
        box_ap=scores.box_ap,
        n_objects=scores.n_objects,
        file_bytes=file_bytes,
        quantize_seconds=seconds,
        evaluate_seconds=time.perf_counter() - started,
        peak_memory_bytes=peak,
    )
    return row, scores


def _noted(row: Row, scores: CocoResult, sample: Sample, limit: int | None) -> dict[str, Any]:
    """Scores as ``carsam evaluate`` notes them."""
    return {
        "coco": _relative(sample.evaluation / "instances.json"),
        "images": _relative(sample.evaluation / "images"),
        "boxes": None,
        "limit": limit,
        **scores.to_dict(),
        "seconds": round(row.evaluate_seconds, 2),
    }


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
    from carsam.data.boxes import clip_boxes
    from carsam.data.coco.instances import CocoInstances
    from carsam.evaluate.overlay import comparison
    from carsam.evaluate.points import mask_iou

    instances = CocoInstances.from_file(sample.evaluation / "instances.json")
    images = sorted(instances.images[:limit], key=lambda image: -len(instances.instances(image.id)))[:count]
    err.print(f"drawing {len(images)} overlays")
    for image in images:
        pixels = instances.read_image(image, sample.evaluation / "images")
        truth = instances.masks(image.id)
        boxes, usable = clip_boxes(instances.boxes(image.id), image.size)
        boxes, dropped = boxes[usable], not usable.all()
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

    from carsam.predict.predictor import SamPredictor

    predictor = SamPredictor(model)
    predictor.set_image(pixels)
    return np.stack([predictor.predict(box=box, multimask_output=False)[0][0] for box in boxes])


def _print_table(rows: list[Row], folder: Path) -> None:
    """The rows side by side, a score a line: the interval stands beside the mean IoU, and what AP rests on below."""
    from carsam.evaluate.scores import few_objects_note, interval_text

    table = Table("", title="Quick start: sam-nano-256 on the embedded evaluation images", title_justify="left")
    for row in rows:
        table.add_column(row.model, justify="right")
    n_objects = rows[0].n_objects
    note = few_objects_note(n_objects) if n_objects is not None else None
    few = f", noisy: {n_objects} objects" if note else ""
    lines: dict[str, Callable[[Row], str]] = {
        "mean IoU": lambda row: f"{row.mean_iou:.1f}",
        "  95 % interval over images": lambda row: interval_text(row.mean_iou_interval),
        "  difference to float": lambda row: str(row.difference or "-"),
        f"segm AP{few}": lambda row: f"{row.segm_ap:.1f}",
        f"box AP{few}": lambda row: f"{row.box_ap:.1f}",
        "weights file": lambda row: megabytes(row.file_bytes),
        "time to quantize": lambda row: "-" if row.quantize_seconds is None else duration(row.quantize_seconds),
        "time to evaluate": lambda row: duration(row.evaluate_seconds),
        "peak memory": lambda row: megabytes(row.peak_memory_bytes) if row.peak_memory_bytes else "-",
    }
    for name, value in lines.items():
        table.add_row(name, *map(value, rows))
    out.print()
    out.print(table)
    if note:
        out.print(note, soft_wrap=True)
    differences = [row.difference for row in rows if row.difference is not None]
    if any(not difference.is_clear for difference in differences):
        out.print("The interval of the difference includes 0: these images do not tell the two apart.", soft_wrap=True)
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
