"""A showcase: a float model beside its quantized form, with scores, pictures and a report in one folder.

``make quickstart`` is one, of the embedded model; any model with annotated images can be another. In the folder lie the
packed folder ``quantized``, ``overlays`` of some evaluation images, ``results.json``, and ``report.html``, which shows
all of it.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from carsam.commands.common import RESULTS, duration, err, float16_bytes, megabytes, merge_results, out, writing
from carsam.commands.progress import Reporter, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from carsam.config import QuantizeConfig
    from carsam.evaluate.coco_metrics import Progress
    from carsam.evaluate.intervals import Difference
    from carsam.evaluate.journal import Journals
    from carsam.run.measured import EvaluationData, Measured, Watch

N_OVERLAYS = 4
QUANTIZED, OVERLAYS, REPORT = "quantized", "overlays", "report.html"


@dataclass(frozen=True)
class Sample:
    """A model with the images that show it.

    Attributes:
        title: Of the closing table: what is measured, on which images.
        model: The float model: a folder, or a checkpoint file.
        calibration, evaluation: Folders with ``images`` and ``instances.json``.
        float_title: What the float model is called in the table.
    """

    title: str
    model: Path
    calibration: Path
    evaluation: Path
    float_title: str = "float (FP16 file)"

    def config(self, n_images: int, **settings: Any) -> QuantizeConfig:
        """CAR-SAM at W4A4, unless ``settings`` say otherwise, on the calibration images with the boxes of their file.

        Args:
            n_images: Calibration images to use.
            settings: Others of :class:`carsam.QuantizeConfig`.
        """
        from carsam.config import CalibrationConfig, QuantizeConfig

        data = CalibrationConfig(
            images=relative(self.calibration / "images"),
            coco=relative(self.calibration / "instances.json"),
            n_images=n_images,
        )
        return QuantizeConfig(calibration=data, **{"method": "car-sam", **settings})

    def evaluation_data(self, limit: int | None = None) -> EvaluationData:
        """What both models are measured on; ``limit`` keeps only the first images."""
        from carsam.run.measured import EvaluationData

        return EvaluationData(self.evaluation / "instances.json", self.evaluation / "images", limit)


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
        evaluate_seconds: Wall-clock time of the evaluation; None where an interrupted one was continued.
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
    evaluate_seconds: float | None
    peak_memory_bytes: int


def showcase(
    sample: Sample,
    folder: Path,
    config: QuantizeConfig,
    *,
    limit: int | None = None,
    restart: bool = True,
    overlays: int = N_OVERLAYS,
) -> list[Row]:
    """Quantizes, evaluates both models, draws overlays, writes the report, and prints the table.

    Args:
        sample: Model and images.
        folder: Where everything goes; an earlier showcase's files there are replaced.
        config: Of the quantization.
        limit: Only the first evaluation images.
        restart: Begin anew. Otherwise, for models that take long, an interrupted showcase goes on: finished units and
            evaluated images are kept, and a quantization that was finished is not done again.
        overlays: Images to draw: those with the most objects.

    Returns:
        The table's rows.

    Raises:
        CarsamError: The sample is damaged, what is kept does not fit, or the disk is full.
    """
    import torch

    from carsam.evaluate.intervals import difference_interval
    from carsam.models.load import load_model
    from carsam.output.files import write_json
    from carsam.pack.checkpoint import folder_size
    from carsam.run.embeddings import Embeddings
    from carsam.run.measured import measure, quantize_and_measure

    # A run that fails half-way must not leave an older run's results beside its own files.
    for stale in (folder / RESULTS, folder / OVERLAYS, folder / REPORT):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
    float_model = load_model(sample.model)
    config.bit_plan()
    name, data = config.bits.upper(), sample.evaluation_data(limit)

    with ExitStack() as stack:
        journals = None if restart else stack.enter_context(_keeping(folder))
        # Begun anew, times are those of the whole work.
        embeddings = None if restart else Embeddings()
        watch = _watch(sample.float_title)
        size = folder_size(sample.model) if sample.model.is_dir() else float16_bytes(float_model)
        floating = measure(float_model, data, size, watch=watch, journals=journals, embeddings=embeddings)
        packed = quantize_and_measure(
            relative(sample.model),
            config.calibration.images,
            config,
            data,
            folder / QUANTIZED,
            watch=_watch(name, f"quantizing {relative(sample.model)} to {name} with {config.method}"),
            journals=journals,
            embeddings=embeddings,
            **_beginning(folder / QUANTIZED, restart=restart),
        )
        difference = difference_interval(packed.scores.per_image, floating.scores.per_image)
        rows = [_row(sample.float_title, floating), _row(name, packed, difference)]
        merge_results(
            folder / QUANTIZED,
            quantization=packed.quantization,
            evaluation=_noted(packed, data),
            float_evaluation=_noted(floating, data),
        )
        models = {"float": float_model, name: packed.model}
        with embeddings.serving(float_model) if embeddings else nullcontext():
            draw_overlays(models, data, folder / OVERLAYS, count=overlays)
        write_page(sample, folder, limit, quiet=restart)

        values = {"rows": [asdict(row) for row in rows], "threads": torch.get_num_threads(), "torch": torch.__version__}
        write_json(folder / RESULTS, values)
    _print_table(sample.title, rows, folder)
    return rows


def _watch(title: str, quantizing: str = "") -> Watch:
    from carsam.run.measured import Watch

    return Watch(lambda: shown(quantizing), functools.partial(_evaluating, title))


@contextmanager
def _evaluating(title: str) -> Iterator[Progress]:
    with Reporter(f"evaluating {title}") as reporter:
        yield reporter.images


def _beginning(quantized: Path, *, restart: bool) -> dict[str, bool]:
    """How a quantization begins: anew, or with what an interrupted or a finished one has left."""
    from carsam.output.target import Output

    if restart:
        return {"restart": True, "overwrite": True}
    interrupted = Output(quantized).partial.exists()
    # Units of an interrupted run come before a model that an earlier one has finished.
    return {"resume": interrupted or quantized.exists(), "overwrite": interrupted, "write_results": True}


@contextmanager
def _keeping(folder: Path) -> Iterator[Journals]:
    """Keeps finished images while a block runs, and says after an interruption how to go on."""
    from carsam.evaluate.journal import Journals
    from carsam.output.user_cache import cache_folder

    with Journals(cache_folder() / "evaluations", note=functools.partial(err.print, soft_wrap=True)) as journals:
        try:
            yield journals
        except KeyboardInterrupt as interrupt:
            where = relative(folder)
            interrupt.args = (f"interrupted; what is finished is kept for {where}, and the same command goes on.",)
            raise


def _row(title: str, found: Measured, difference: Difference | None = None) -> Row:
    scores = found.scores
    return Row(
        title,
        mean_iou=scores.mean_iou,
        mean_iou_interval=scores.mean_iou_interval,
        difference=difference,
        segm_ap=scores.segm_ap,
        box_ap=scores.box_ap,
        n_objects=scores.n_objects,
        file_bytes=found.file_bytes,
        quantize_seconds=None if found.quantization is None else found.quantization["seconds"],
        evaluate_seconds=found.evaluate_seconds,
        peak_memory_bytes=found.peak_memory,
    )


def _noted(found: Measured, data: EvaluationData) -> dict[str, Any]:
    """Scores as ``carsam evaluate`` notes them."""
    seconds = found.evaluate_seconds
    return {
        "coco": relative(Path(data.coco)),
        "images": relative(Path(data.images)),
        "boxes": None,
        "limit": data.limit,
        **found.scores.to_dict(),
        **({} if seconds is None else {"seconds": round(seconds, 2)}),
    }


def write_page(sample: Sample, folder: Path, limit: int | None, *, quiet: bool = False) -> None:
    """Diagnoses the packed model and writes the page that shows everything; without sensitivities, for speed.

    Args:
        sample: Model and images.
        folder: The showcase's.
        limit: Only the first evaluation images.
        quiet: Do not show how far the diagnosis is.

    Raises:
        CarsamError: The folder cannot be written.
    """
    from carsam.diagnose.run import N_IMAGES as DIAGNOSED
    from carsam.diagnose.run import diagnose
    from carsam.report.page import write_report

    if quiet:
        err.print("writing the report")
    with Reporter("writing the report", quiet=quiet) as reporter:
        diagnose(
            relative(sample.model),
            relative(folder / QUANTIZED),
            relative(sample.evaluation / "images"),
            coco=relative(sample.evaluation / "instances.json"),
            limit=limit or DIAGNOSED,
            with_sensitivity=False,
            progress=reporter.step,
        )
    write_report(folder / QUANTIZED, folder / REPORT, None)


def draw_overlays(
    models: dict[str, PreTrainedModel], data: EvaluationData, folder: Path, *, count: int = N_OVERLAYS
) -> None:
    """Draws image, float masks and quantized masks side by side for some evaluation images.

    Args:
        models: By title.
        data: Images to choose from.
        folder: Where to; one PNG an image.
        count: Images to draw: those with the most objects.

    Raises:
        CarsamError: The folder cannot be written.
    """
    from carsam.data.boxes import clip_boxes
    from carsam.data.coco.instances import CocoInstances
    from carsam.evaluate.overlay import comparison
    from carsam.evaluate.points import mask_iou

    instances = CocoInstances.from_file(data.coco)
    images = sorted(instances.images[: data.limit], key=lambda image: -len(instances.instances(image.id)))[:count]
    err.print(f"drawing {len(images)} overlays")
    for image in images:
        pixels = instances.read_image(image, data.images)
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


def _masks(model: PreTrainedModel, pixels: Any, boxes: Any) -> Any:
    """Masks ``(N, H, W)`` bool of an image for boxes ``(N, 4)`` in its pixels."""
    import numpy as np

    from carsam.predict.predictor import SamPredictor

    predictor = SamPredictor(model)
    predictor.set_image(pixels)
    return np.stack([predictor.predict(box=box, multimask_output=False)[0][0] for box in boxes])


def _print_table(title: str, rows: list[Row], folder: Path) -> None:
    """The rows side by side, a score a line: the interval stands beside the mean IoU, and what AP rests on below."""
    from carsam.evaluate.scores import few_objects_note, interval_text

    table = Table("", title=title, title_justify="left")
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
        "time to evaluate": lambda row: "-" if row.evaluate_seconds is None else duration(row.evaluate_seconds),
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
    for name, what in {
        QUANTIZED: "packed model",
        OVERLAYS: "overlays",
        RESULTS: "results",
        REPORT: "report",
    }.items():
        out.print(f"{what:<13} {relative(folder / name)}", markup=False, soft_wrap=True)


def relative(path: Path) -> str:
    """The path from the current folder where that is shorter: recipes then fit every checkout."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
