"""``carsam evaluate --video`` and ``carsam predict --video``."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from carsam.commands.common import duration, err, merge_results, open_model
from carsam.commands.output import Output
from carsam.commands.progress import Reporter
from carsam.errors import ConfigError

if TYPE_CHECKING:
    from carsam.evaluate.journal import Journals
    from carsam.evaluate.video import Progress, VideoResult
    from carsam.predict.prompts import Prompt

logger = logging.getLogger(__name__)

_MEASURES = (("j", "J"), ("f", "F"))


@dataclass(frozen=True)
class VideoOptions:
    """What ``carsam evaluate --video`` measures on.

    Attributes:
        root: The data set.
        prompt: ``mask`` or ``box`` of an object's first frame.
        limit: Only the first videos.
        frames: Only the first frames of each.
        out: Folder for the masks.
        overwrite: Replace the results in it.
        restart: Discard what an interrupted evaluation finished.
    """

    root: Path
    prompt: str
    limit: int | None
    frames: int | None
    out: Path | None
    overwrite: bool
    restart: bool


def evaluate_video(
    model: str,
    options: VideoOptions,
    floating: str | None,
    json: str | None,
    *,
    save: bool,
    quiet: bool,
    **loading: Any,
) -> None:
    """Measures a model, and the float one beside it, on videos.

    Args:
        model: What ``carsam evaluate`` was given.
        options: What to measure on.
        floating: A float model to compare with.
        json: Where the result goes as JSON.
        save: Note the scores in a packed folder's ``results.json``.
        quiet: No progress.
        **loading: Of :func:`carsam.commands.common.open_model`.
    """
    from carsam.data.video.dataset import find_videos
    from carsam.evaluate.journal import Journals
    from carsam.evaluate.video import RESULTS, ResultFolder, evaluate_videos
    from carsam.output.files import write_json
    from carsam.output.user_cache import cache_folder
    from carsam.pack.checkpoint import is_packed

    if floating is not None and floating.lower().endswith(".json"):
        raise ConfigError("with --video, --float takes a model; scores in a file are of images.")
    output = Output(json, quiet=quiet)
    data = find_videos(options.root)
    folder = None if options.out is None else ResultFolder(options.out, options.overwrite)
    if folder is not None:
        folder.check(data)
    float_model = None if floating is None else open_model(floating, **loading)
    quantized = open_model(model, **loading)
    settings: dict[str, Any] = {"prompt": options.prompt, "limit": options.limit, "frames": options.frames}
    started = time.perf_counter()
    note = None if quiet else (lambda line: err.print(line.replace("images are kept", "videos are kept")))
    with Journals(cache_folder() / "videos", restart=options.restart, note=note) as journals:
        try:
            float_result = None
            if float_model is not None:
                with _reporting("following objects with the float model", quiet) as progress:
                    float_result = evaluate_videos(
                        float_model, options.root, journals=journals, progress=progress, **settings
                    )
            with _reporting("following objects", quiet) as progress:
                result = evaluate_videos(
                    quantized, options.root, masks=folder, journals=journals, progress=progress, **settings
                )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_interrupted(journals)) from None
        output.print(_table(model, result, float_result))
        output.line(duration(time.perf_counter() - started))
        values = {"model": model, "videos": str(options.root), "limit": options.limit, "frames": options.frames}
        values |= result.to_dict()
        if float_result is not None:
            values["float"] = {"model": floating, **float_result.to_dict()}
        output.save(values)
        if folder is not None:
            from carsam.pack.folder import portable

            write_json(folder.path / RESULTS, portable(values))
    if save and is_packed(model):
        try:
            merge_results(Path(model), video_evaluation=values)
        except ValueError as error:
            logger.warning("the scores are not saved in the packed folder: %s --no-save leaves this out.", error)


@contextmanager
def _reporting(title: str, quiet: bool) -> Iterator[Progress | None]:
    if quiet:
        yield None
        return
    with Reporter(title) as reporter:
        yield reporter.video


def _interrupted(journals: Journals) -> str:
    kept, total = journals.kept
    if not kept:
        return "interrupted; no video was finished."
    return f"interrupted; {kept} of {total} videos are kept. Run the same command again to go on, or with --restart."


def _table(model: str, result: VideoResult, float_result: VideoResult | None) -> Table:
    columns = [("float", float_result)] if float_result is not None else []
    columns.append((Path(model).name or model, result))
    title = f"{model}: {len(result.objects)} objects, {result.n_frames} frames, shown by their first {result.prompt}"
    table = Table("", title=title, title_justify="left")
    for name, _ in columns:
        table.add_column(name, justify="right")
    table.add_row("J&F", *(f"{each.j_and_f:.1f}" for _, each in columns))
    for key, letter in _MEASURES:
        for what in ("mean", "recall", "decay"):
            name = letter if what == "mean" else f"  {letter} {what}"
            table.add_row(name, *(f"{each.mean(key, what):.1f}" for _, each in columns))
    table.add_row("frames a second", *(f"{each.n_frames / max(each.seconds, 1e-9):.1f}" for _, each in columns))
    return table


@dataclass(frozen=True)
class FollowOptions:
    """What ``carsam predict --video`` follows.

    Attributes:
        folder: The frames.
        prompts: Of the objects, on the first frame.
        mask: A mask with the objects' numbers, instead of prompts.
        out: Folder for the masks.
        overlay: Also draw the masks over the frames.
        overwrite: Replace files that are there.
    """

    folder: Path
    prompts: list[Prompt]
    mask: Path | None
    out: Path
    overlay: bool
    overwrite: bool


def predict_video(model: str, options: FollowOptions, json: str | None, *, quiet: bool, **loading: Any) -> None:
    """Writes the masks of objects that are followed through a folder of frames."""
    from carsam.data.video.frames import open_video
    from carsam.predict.follow import Following

    if bool(options.prompts) == (options.mask is not None):
        raise ConfigError(
            "show the objects on the first frame: with --box or --point, or with --mask, a PNG of numbers."
        )
    output = Output(json, quiet=quiet)
    video = open_video(options.folder)
    following = Following(video, options.out, overlay=options.overlay, overwrite=options.overwrite)
    following.check()
    shown = following.shown(options.prompts, options.mask)
    opened = open_model(model, **loading)
    started = time.perf_counter()
    with Reporter(f"following objects through {options.folder}", quiet=quiet) as reporter:
        report = following.run(opened, shown, lambda done, total: reporter.step("video", "frame", done, total))
    seconds = time.perf_counter() - started
    for each in report:
        away = f", not there on {each['frames_without']}" if each["frames_without"] else ""
        output.line(f"object {each['object']}: {each['frames']} frames{away}")
    output.line(f"{len(video)} masks in {options.out}, {len(video) / max(seconds, 1e-9):.1f} frames a second")
    output.save({"model": model, "video": str(options.folder), "out": str(options.out), "objects": report})
