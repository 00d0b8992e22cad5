"""``carsam evaluate``: scores of a packed or float model on a COCO data set."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from carsam.commands.common import (
    Device,
    ImageSize,
    Normalise,
    Runtime,
    duration,
    err,
    in_torch_only,
    merge_results,
    open_model,
)
from carsam.commands.output import Json, Output, Quiet, renamed
from carsam.commands.progress import Reporter
from carsam.commands.videos import VideoOptions, evaluate_video
from carsam.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from carsam.evaluate.coco_metrics import Progress
    from carsam.evaluate.intervals import Difference
    from carsam.evaluate.journal import Journals
    from carsam.evaluate.points import PointResult
    from carsam.evaluate.scores import CocoResult

logger = logging.getLogger(__name__)

VIDEO = "Videos"


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Packed folder, or a float model as for carsam quantize.", show_default=False)
    ],
    coco: Annotated[Path | None, typer.Option(help="COCO instances file.", show_default=False)] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder that its file names are relative to.", show_default=False)
    ] = None,
    detections: Annotated[
        Path | None,
        typer.Option(help="COCO detection results whose boxes are the prompts.", show_default="the file's own boxes"),
    ] = None,
    boxes: Annotated[Path | None, typer.Option(hidden=True)] = None,
    points: Annotated[bool, typer.Option("--points", help="Also the mean IoU after 1, 3 and 5 clicks.")] = False,
    limit: Annotated[
        int | None, typer.Option(help="Only the first images (with --video: videos).", show_default="all", min=1)
    ] = None,
    floating: Annotated[
        str | None,
        typer.Option(
            "--float",
            help="Float model to compare with, or its scores (what --json wrote, or a results.json).",
            metavar="MODEL_OR_JSON",
            show_default=False,
        ),
    ] = None,
    json: Json = None,
    save: Annotated[
        bool, typer.Option("--save/--no-save", help="Note the scores in a packed folder's results.json.")
    ] = True,
    restart: Annotated[
        bool, typer.Option("--restart", "--no-resume", help="Discard what an interrupted evaluation finished.")
    ] = False,
    video: Annotated[
        Path | None,
        typer.Option(
            help="Root of a data set of videos, in DAVIS's form or SA-V's, instead of --coco: J, F and J&F.",
            show_default=False,
            rich_help_panel=VIDEO,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="mask|box",
            help="What of its first frame shows an object.",
            show_default="mask",
            rich_help_panel=VIDEO,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(help="Only the first frames of every video.", show_default="all", min=3, rich_help_panel=VIDEO),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for the masks and results.json, as the data sets' own tools read them.",
            show_default=False,
            rich_help_panel=VIDEO,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the results in --out.", rich_help_panel=VIDEO)
    ] = False,
    normalise: Normalise = None,
    image_size: ImageSize = None,
    device: Device = "auto",
    runtime: Runtime = "torch",
    quiet: Quiet = False,
) -> None:
    """Measure masks from box prompts (segm AP, box AP, mean IoU), or objects followed through videos (J, F).

    An interrupted evaluation goes on where it stopped when the same command is given again.
    """
    from carsam.evaluate.journal import Journals
    from carsam.output.user_cache import cache_folder
    from carsam.pack.checkpoint import is_packed

    detections = renamed("--detections", detections, quiet=quiet, boxes=boxes)
    if video is not None:
        in_torch_only(runtime)
        given = {"--coco": coco, "--images": images, "--detections": detections, "--points": points or None}
        if others := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"--video measures on videos; leave out {' and '.join(others)}.")
        of_video = VideoOptions(video, prompt or "mask", limit, frames, masks, overwrite, restart)
        common = {"normalise": normalise, "image_size": image_size, "device": device}
        evaluate_video(model, of_video, floating, json, save=save, quiet=quiet, **common)
        return
    given = {"--prompt": prompt, "--frames": frames, "--out": masks, "--overwrite": overwrite or None}
    if others := [name for name, value in given.items() if value is not None]:
        raise ConfigError(f"{' and '.join(others)} need --video, a data set of videos.")
    if coco is None or images is None:
        raise ConfigError("give --coco and --images to measure on images, or --video to measure on videos.")
    _keep_inputs(json, model, coco, detections, floating)
    output = Output(json, quiet=quiet)
    float_scores = _read_float_scores(floating)
    float_model = None
    if floating is not None and float_scores is None:
        float_model = open_model(floating, device, normalise, image_size)
    sam = open_model(model, device, normalise, image_size, runtime)

    data = _Data(coco, images, detections, limit, points, quiet, runtime)
    started = time.perf_counter()
    # Finished images stay until everything that was asked for is written.
    with Journals(cache_folder() / "evaluations", restart=restart, note=None if quiet else _note) as journals:
        try:
            float_run = None
            if float_model is not None:
                float_run = replace(data, runtime="torch").measure(float_model, journals, "the float model, ")
            run = data.measure(sam, journals)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_interrupted(journals)) from None
        if float_run is not None:
            float_scores = float_run.result
        difference = _difference(run.result, float_scores)
        output.print(_table(model, run, float_scores, float_run))
        for line in _lines_below(run.result, difference):
            output.line(line)
        output.line(duration(time.perf_counter() - started))
        output.save({"model": model, **run.to_dict(), **_difference_entry(floating, difference)})
    if save and is_packed(model):
        floats = {} if float_run is None else {"float_evaluation": float_run.to_dict()}
        _save(Path(model), evaluation=run.to_dict(), **floats)


@dataclass(frozen=True)
class _Run:
    """One model measured: scores and what they were measured on."""

    data: dict[str, Any]
    result: CocoResult
    clicks: PointResult | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As ``results.json`` has it."""
        points = {} if self.clicks is None else {"points": self.clicks.to_dict()}
        return {**self.data, **self.result.to_dict(), **points, "seconds": round(self.seconds, 2)}


@dataclass(frozen=True)
class _Data:
    """What to measure on."""

    coco: Path
    images: Path
    detections: Path | None
    limit: int | None
    points: bool
    quiet: bool
    runtime: str

    def measure(self, model: PreTrainedModel, journals: Journals, whose: str = "") -> _Run:
        """Evaluates a model with boxes and, where asked for, with clicks."""
        from carsam.evaluate.coco_metrics import evaluate_coco
        from carsam.evaluate.points import evaluate_points

        started = time.perf_counter()
        common: dict[str, Any] = {"limit": self.limit, "journals": journals}
        with self._reporting(f"evaluating {whose}boxes") as progress:
            result = evaluate_coco(
                model, self.coco, self.images, detections=self.detections, progress=progress, **common
            )
        clicks = None
        if self.points:
            with self._reporting(f"evaluating {whose}clicks") as progress:
                clicks = evaluate_points(model, self.coco, self.images, progress=progress, **common)
        boxes = str(self.detections) if self.detections else None
        data = {"coco": str(self.coco), "images": str(self.images), "boxes": boxes, "limit": self.limit}
        if self.runtime != "torch":
            data["runtime"] = self.runtime
        return _Run(data, result, clicks, time.perf_counter() - started)

    @contextmanager
    def _reporting(self, title: str) -> Iterator[Progress | None]:
        """Yields the callback that shows how far the images are; None with ``--quiet``."""
        if self.quiet:
            yield None
            return
        with Reporter(title) as reporter:
            yield reporter.images


def _keep_inputs(json: str | None, *inputs: str | Path | None) -> None:
    """Refuses to write scores over a file that is read from."""
    for name in inputs:
        if json is None or name is None or not os.path.exists(json) or not os.path.exists(name):
            continue
        if os.path.samefile(json, name):
            raise ConfigError(f"--json {json} would overwrite the file that is read from; give another name.")


def _read_float_scores(floating: str | None) -> CocoResult | None:
    """The scores in a JSON file; None where a model was given, or nothing."""
    from carsam.evaluate.scores import read_float_scores

    is_file = floating is not None and floating.lower().endswith(".json")
    return read_float_scores(floating) if is_file else None


def _note(line: str) -> None:
    err.print(line, soft_wrap=True)


def _interrupted(journals: Journals) -> str:
    kept, total = journals.kept
    if not kept:
        return "interrupted; no image was finished."
    return f"interrupted; {kept} of {total} images are kept. Run the same command again to go on, or with --restart."


def _difference(result: CocoResult, float_scores: CocoResult | None) -> Difference | None:
    from carsam.evaluate.intervals import difference_interval

    if float_scores is None:
        return None
    try:
        found = difference_interval(result.per_image, float_scores.per_image)
    except DataError as error:
        # The scores themselves are right, and took long.
        logger.warning("no difference to the float model: %s", error)
        return None
    if found is None:
        logger.warning("no difference to the float model: fewer than two images with prompts are common to both.")
    return found


def _difference_entry(floating: str | None, difference: Difference | None) -> dict[str, Any]:
    if difference is None:
        return {}
    return {"difference_to_float": {"float": floating, "mean_iou": difference.to_dict()}}


def _table(model: str, run: _Run, float_scores: CocoResult | None, float_run: _Run | None) -> Table:
    """A score a line, so that it fits a terminal of 80 columns."""
    from carsam.evaluate.scores import AP_NAMES, interval_text, score_text

    columns = [(Path(model).name or model, run.result, run.clicks)]
    if float_scores is not None:
        columns.insert(0, ("float", float_scores, float_run.clicks if float_run is not None else None))
    title = f"{model}: {run.result.n_prompts} boxes, {run.result.n_images} images"
    table = Table("", title=title, title_justify="left")
    for name, _, _ in columns:
        table.add_column(name, justify="right")

    results = [result for _, result, _ in columns]
    table.add_row("mean IoU", *(score_text(result.mean_iou, 2) for result in results))
    table.add_row("  95 % interval over images", *(interval_text(result.mean_iou_interval) for result in results))
    for key, name in AP_NAMES.items():
        table.add_row(name, *(score_text(getattr(result, key), 2) for result in results))
    for n in run.clicks.mean_iou if run.clicks is not None else ():
        clicked = [clicks.mean_iou.get(n) if clicks is not None else None for _, _, clicks in columns]
        table.add_row(f"mean IoU, {n} click{'s' if n > 1 else ''}", *(score_text(iou, 2) for iou in clicked))
    return table


def _lines_below(result: CocoResult, difference: Difference | None) -> list[str]:
    lines = list(result.notes)
    if difference is not None:
        unclear = "" if difference.is_clear else "; it includes 0, so these images do not tell them apart"
        lines.append(
            f"mean IoU differs from float by {difference.value:+.2f} points (95 % interval over {difference.n_images} "
            f"images: {difference.low:+.2f} to {difference.high:+.2f}{unclear})."
        )
    return lines


def _save(folder: Path, **parts: Any) -> None:
    """Notes the scores in ``results.json``; a folder of somebody else's is no reason to fail."""
    try:
        merge_results(folder, **parts)
    except ValueError as error:  # CarsamError, or a number in results.json that JSON cannot hold
        logger.warning("the scores are not saved in the packed folder: %s --no-save leaves this out.", error)
