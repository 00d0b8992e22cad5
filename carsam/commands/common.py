"""What the commands share: consoles, errors, devices and models, sizes, files that appear whole."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console

from carsam.errors import CarsamError, ConfigError
from carsam.output.files import clear_spills, write_json
from carsam.output.signals import interrupts, message

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESULTS = "results.json"
METHODS = (
    "adaround",
    "ahcptq",
    "ahcq-sam",
    "brecq",
    "car-sam",
    "car-sam-plus",
    "ptq4sam-l",
    "ptq4sam-s",
    "qdrop",
    "rtn",
)  # completed without importing torch


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


# Wide enough for the tables where output goes to a file, whose width nobody knows; COLUMNS is the user's word on it.
_WIDTH = None if _is_terminal(sys.stdout) or "COLUMNS" in os.environ else 120

# Text is text: paths and patterns with brackets are no markup, ":x:" in a name is no emoji.
out = Console(width=_WIDTH, highlight=False, markup=False, emoji=False)
err = Console(stderr=True, width=_WIDTH, highlight=False, markup=False, emoji=False)


def complete_from(*values: str) -> Callable[[str], list[str]]:
    """A shell completion: those of some values that begin as typed."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


Device = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, cuda:1, or auto: a GPU where there is one.",
        metavar="DEVICE",
        autocompletion=complete_from("auto", "cpu", "cuda"),
    ),
]

Normalise = Annotated[
    str | None,
    typer.Option(
        help="imagenet, unit (pixels scaled to 0..1) or min-max (each image stretched to 0..1).",
        metavar="HOW",
        show_default="the model's own",
        autocompletion=complete_from("imagenet", "unit", "min-max"),
    ),
]

Runtime = Annotated[
    str,
    typer.Option(
        help="torch; onnx: ONNX Runtime on the processor, quantized layers in integers; cuda: integers on an NVIDIA "
        "GPU.",
        metavar="NAME",
        autocompletion=complete_from("torch", "onnx", "cuda"),
    ),
]

ImageSize = Annotated[
    int | None,
    typer.Option(
        help="Side of the input in pixels, for a checkpoint that does not show it (MobileSAM at another size).",
        metavar="PIXELS",
        min=1,
        show_default="the model's own",
    ),
]


@contextmanager
def errors_for_people() -> Iterator[None]:
    """Prints errors that the user can fix as one paragraph, without a traceback, and sets the exit code.

    It is 1; 130 after Ctrl-C, 143 after SIGTERM, 129 where the terminal went away. Those end as Ctrl-C does. Before the
    block, what killed processes of carsam left in the temporary folder is removed.
    """
    clear_spills()
    with interrupts():
        try:
            yield
        except CarsamError as error:
            _say("error", str(error))
            raise typer.Exit(1) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            # Of a file: the machine's answer (no permission, a full disk, a name too long), not a defect. Others are.
            if error.filename is None:
                raise
            name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else str(error.filename)
            _say("error", f"{name[:200]}: {error.strerror or error}.")
            raise typer.Exit(1) from None
        except KeyboardInterrupt as interrupt:
            _say("error", message(interrupt) or "interrupted.")
            raise typer.Exit(getattr(interrupt, "code", 130)) from None


def _say(kind: str, message: str) -> None:
    # No hard wraps: they would cut paths.
    err.print(printable(f"{kind}: {' '.join(message.split())}"), soft_wrap=True)


def printable(text: str) -> str:
    """Text whose control characters, as a file's name may hold them, are written as escapes; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class _Warnings(logging.Handler):
    """carsam's logged warnings, through the console that also draws the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        _say("warning", record.getMessage())


def show_warnings() -> None:
    """Shows carsam's logged warnings on stderr."""
    logger = logging.getLogger("carsam")
    if not any(isinstance(handler, _Warnings) for handler in logger.handlers):
        logger.addHandler(_Warnings(logging.WARNING))


def in_torch_only(runtime: str) -> None:
    """Refuses another runtime for videos, whose memory has no halves.

    Raises:
        ConfigError: It is not torch.
    """
    if runtime != "torch":
        raise ConfigError(f"--video runs in torch; leave out --runtime {runtime}.")


def open_model(
    source: str, device: str, normalise: str | None = None, image_size: int | None = None, runtime: str = "torch"
) -> PreTrainedModel:
    """A packed or a float model, whichever ``source`` is: a folder, a Hub id, or a checkpoint file.

    Raises:
        CarsamError: It is neither, or damaged; the device is not there; the runtime does not run it.
    """
    from carsam.pack.checkpoint import open_model

    return open_model(source, device=device, normalise=normalise, image_size=image_size, runtime=runtime)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write into an error for people.

    Raises:
        CarsamError: The disk is full, or the place is not writable.
    """
    try:
        yield
    except OSError as error:
        raise CarsamError(f"cannot write {path}: {error.strerror or error}.") from error


def merge_results(folder: Path, **parts: Any) -> None:
    """Puts measurements into a packed folder's ``results.json`` and its model card; other parts there stay.

    Neither holds a path of this machine: of files and folders elsewhere, the name is kept.

    Raises:
        CarsamError: The disk is full, or the folder is not writable.
    """
    from carsam.pack.folder import portable
    from carsam.pack.model_card import update_card

    results = portable({**read_results(folder), **parts})
    write_json(folder / RESULTS, results)
    update_card(folder, results)


def read_results(folder: Path) -> dict[str, Any]:
    """Measurements of a packed folder; empty where there are none (or nothing readable)."""
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return results if isinstance(results, dict) else {}


def float16_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's weights in FP16, also of a packed model: what its float file weighs."""
    from carsam.pack.checkpoint import packed_state
    from carsam.pack.layers import PackedLayer

    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}
    grid = ("weight_scale", "weight_zero_point", "scale", "zero_point", "group", "split", "offset", "tau")
    count = 0
    for name, value in packed_state(model).items():
        owner, _, leaf = name.rpartition(".")
        if leaf not in grid:
            shape = packed[owner].shape if owner in packed and leaf == "weight" else value.shape
            size = 1
            for side in shape:
                size *= side
            count += size
    return 2 * count


def megabytes(size: int) -> str:
    """``3.1 MB``, ``1.25 GB``."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """``41.3 s``, ``3 min 12 s``, ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
