"""``carsam benchmark``: what a model costs here, in other hands and quantized by carsam."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from carsam.commands.common import ImageSize, megabytes, open_model
from carsam.commands.output import Json, Output, Quiet
from carsam.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from carsam.benchmark.run import Row, Score
    from carsam.benchmark.subjects import Subject

logger = logging.getLogger(__name__)

ACCURACY = "Accuracy"
# Of a row, by the headings of the table.
SCORES = {"segm_ap": "AP", "mean_iou": "mIoU", "dsc": "DSC"}


def benchmark(
    model: Annotated[str, typer.Argument(help="Float model, as for carsam quantize.", show_default=False)],
    packed: Annotated[
        list[Path] | None,
        typer.Argument(help="Packed folders of it.", show_default="round to nearest at w8a8, w6a6 and w4a4"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images: the first is timed, some calibrate what has no folder yet.",
            show_default="noise",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of every subject.", min=1, show_default="cores")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds in which all are timed in turn.", min=1)] = 7,
    at_once: Annotated[
        int, typer.Option(help="Subjects in memory at once, beside the one they are set against.", min=1)
    ] = 3,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only rows whose name holds this; repeatable. The first row always is one.", metavar="TEXT"),
    ] = None,
    coco: Annotated[
        Path | None,
        typer.Option(help="COCO instances file to score every row on.", rich_help_panel=ACCURACY, show_default=False),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder that its file names are relative to.", rich_help_panel=ACCURACY, show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the file's first images.", min=1, rich_help_panel=ACCURACY)
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Folder for the files that are made.", show_default="a temporary one")
    ] = None,
    image_size: ImageSize = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measure file, memory and time of a model in PyTorch, ONNX Runtime and OpenVINO, float and quantized.

    Every row runs in a process of its own. They are timed in turn, and the table holds medians.
    """
    if (coco is None) != (images is None):
        raise ConfigError("--coco and --images must be given together.")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    from carsam.benchmark.processor import busy, processor
    from carsam.benchmark.run import Plan, measure
    from carsam.benchmark.subjects import Work, subjects
    from carsam.export.requirements import require_onnx, require_runtime

    require_onnx()
    require_runtime()
    output = Output(json, quiet=quiet)
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    folders = _folders(packed or [])
    rows = _chosen(subjects(list(folders)), only or [])
    floating = open_model(model, "cpu", None, image_size)
    pixels = _pixels(floating, data)
    with tempfile.TemporaryDirectory(prefix="carsam-benchmark-") as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        ours = _packed(floating, _needed(folders, rows), pixels)
        output.line(f"{processor()}; {threads} threads; others at work: load {busy():.1f}")
        work = Work(model, floating, ours, folder, pixels, threads, image_size)
        score = None if coco is None else _score(coco, images, limit)
        say = (lambda _: None) if quiet else output.line
        found: list[Row] = []
        try:
            measure(work, rows, pixels[0], _prompt(floating), Plan(rounds, at_once), say, score, found)
        finally:
            # Also what an interrupted benchmark has measured: its rows are whole.
            if found:
                output.print(_table(model, found))
                for line in (*_bits_beside_bits(found), *_warnings(found)):
                    output.line(line)
                about = {"model": model, "processor": processor(), "threads": threads, "load": busy()}
                output.save({**about, "rows": [row.to_dict() for row in found]})


def _pixels(model: PreTrainedModel, images: Path | None) -> list[np.ndarray]:
    """Preprocessed images (1, 3, S, S): some of a folder, or noise."""
    import numpy as np

    from carsam.data.images.reading import list_images, read_image
    from carsam.data.images.transforms import Preprocessor
    from carsam.models.family import family_of

    if images is None:
        side = family_of(model).image_size(model)
        return [np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)]
    preprocess = Preprocessor.for_model(model)
    return [preprocess(read_image(path))[0].numpy() for path in list_images(images)[:4]]


def _folders(packed: Sequence[Path]) -> dict[str, Path | None]:
    """Ours by their bits, as ``W4A4``: a packed folder each, or None where one is made by nearest rounding."""
    from carsam.pack.folder import is_packed, read_config

    if not packed:
        return {"W8A8": None, "W6A6": None, "W4A4": None}
    found: dict[str, Path | None] = {}
    for folder in packed:
        if not is_packed(folder):
            raise ConfigError(f"{folder} is not a packed folder; give what carsam quantize wrote.")
        name = str(read_config(folder)["quantization_config"].get("bits", "")).upper() or folder.name
        found[name if name not in found else f"{name} ({folder.name})"] = folder
    return found


def _needed(folders: dict[str, Path | None], rows: Sequence[Subject]) -> dict[str, Path | None]:
    """Those that a row is of."""
    return {name: place for name, place in folders.items() if any(row.name.startswith(f"ours {name},") for row in rows)}


def _packed(
    model: PreTrainedModel, folders: dict[str, Path | None], pixels: Sequence[np.ndarray]
) -> dict[str, PreTrainedModel]:
    """Ours: loaded, or made by nearest rounding of ranges seen on the images."""
    from carsam.benchmark.nearest import nearest
    from carsam.pack.checkpoint import load

    return {
        name: load(place) if place is not None else nearest(model, name.lower(), pixels)
        for name, place in folders.items()
    }


def _chosen(rows: list[Subject], only: Sequence[str]) -> list[Subject]:
    first, *others = rows
    chosen = [row for row in others if not only or any(text.lower() in row.name.lower() for text in only)]
    if only and not chosen:
        raise ConfigError(f"no row's name holds {', '.join(only)}; there are {'; '.join(row.name for row in rows)}.")
    return [first, *chosen]


def _prompt(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """A click in the middle."""
    import numpy as np

    from carsam.models.family import family_of

    side, mask = family_of(model).image_size(model), family_of(model).low_res_size(model)
    points = np.array([[[side / 2, side / 2], [0, 0]]], np.float32)
    labels = np.array([[1, -1]], np.float32)
    return {
        "points": points,
        "labels": labels,
        "mask": np.zeros((1, 1, mask, mask), np.float32),
        "has_mask": np.zeros(1, np.float32),
    }


def _score(coco: Path, images: Path, limit: int | None) -> Score:
    from carsam.evaluate.coco_metrics import evaluate_coco

    def score(model: PreTrainedModel) -> dict[str, float]:
        result = evaluate_coco(model, coco, images, limit=limit)
        return {"segm_ap": result.segm_ap, "mean_iou": result.mean_iou, "dsc": result.dsc}

    return score


def _table(model: str, rows: Sequence[Row]) -> Table:
    scored = any(row.scores for row in rows)
    table = Table("", title=model, title_justify="left")
    for column in ("files", "memory", "encoder", "×", "a prompt", "×", *(SCORES.values() if scored else ())):
        table.add_column(column, justify="right")
    for row in rows:
        if not row.encoder_ms:
            table.add_row(row.name, "not measured", *[""] * (len(table.columns) - 2))
            continue
        cells = [megabytes(row.file_bytes), megabytes(row.peak_bytes)]
        cells += [f"{median(row.encoder_ms):.0f} ms", f"{row.speed:.2f}"]
        cells += [f"{median(row.decoder_ms):.1f} ms", f"{row.decoder_speed:.2f}"]
        if scored:
            cells += [f"{row.scores[key]:.2f}" if key in row.scores else "" for key in SCORES]
        table.add_row(row.name, *cells)
    return table


def _bits_beside_bits(rows: Sequence[Row]) -> list[str]:
    """What fewer bits cost or save: ours in one runtime and the same rounds, each beside the first."""
    firsts: list[Row] = []
    lines = []
    for row in (row for row in rows if row.ours and row.encoder_ms):
        runtime = row.name.rpartition(", ")[2]
        first = next((each for each in firsts if each.name.endswith(runtime) and row.against(each)), None)
        if first is None:
            firsts.append(row)
            continue
        low, middle, high = row.against(first)
        lines.append(
            f"{row.name} takes {middle:.2f} of the time of {first.name} "
            f"(median of {len(row.encoder_ms)} rounds; half of them {low:.2f} to {high:.2f})"
        )
    return lines


def _warnings(rows: Sequence[Row]) -> list[str]:
    """What a user should not overlook."""
    found = [f"{row.name}: {row.failed}" for row in rows if row.failed]
    timed = [row for row in rows if row.encoder_ms]
    floats = [row for row in timed if not row.ours]
    for row in timed:
        if row.ours and row.speed < 1:
            found.append(
                f"warning: on this machine {row.name} is slower than {rows[0].name} "
                f"({row.speed:.2f}×): its processor multiplies bytes no faster than floats, or other programs are at "
                "work. Use it for its size, or run it elsewhere."
            )
    fastest = max(floats, key=lambda row: row.speed, default=None)
    own = max((row for row in timed if row.ours), key=lambda row: row.speed, default=None)
    if own is not None and fastest is not None and own.speed < fastest.speed:
        found.append(f"the fastest here is {fastest.name} ({fastest.speed:.2f}×); ours, {own.name}: {own.speed:.2f}×")
    return found
