"""Where the result of a command goes, and options under which all commands have the same name."""

from __future__ import annotations

import json as json_module
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console, RenderableType

from carsam.commands.common import err, out, printable
from carsam.errors import ConfigError
from carsam.output.files import write_json

STDOUT = "-"

Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Also write the result here as JSON; - writes it to the standard output, and nothing else there.",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes; warnings and errors remain.")]

Value = TypeVar("Value")


class Output:
    """The result of a command: text on stdout, or JSON alone there and the text on stderr (``--json -``).

    Args:
        json: ``--json`` as given: a file, ``-``, or None.
        quiet: Whether stderr is for warnings and errors only.

    Raises:
        ConfigError: The file for JSON cannot be written; said before the work whose result it is to hold.
    """

    def __init__(self, json: str | None = None, *, quiet: bool = False):
        self._json = json
        self.console: Console | None = out
        if json == STDOUT:
            self.console = None if quiet else err
        elif json is not None:
            check_file(Path(json), "--json")

    def print(self, content: RenderableType) -> None:
        """A table, or text that is wrapped to the terminal."""
        if self.console is not None:
            self.console.print(content)

    def line(self, text: str) -> None:
        """A line as it is: paths in it are not cut."""
        if self.console is not None:
            self.console.print(printable(text), soft_wrap=True)

    def save(self, values: Any) -> None:
        """Writes the result as JSON where that was asked for; numbers that JSON does not have become null.

        Raises:
            CarsamError: The disk is full, or the place is not writable.
        """
        if self._json == STDOUT:
            if sys.stdout is not None:
                typer.echo(json_module.dumps(_finite(values), indent=2, allow_nan=False))
        elif self._json is not None:
            write_json(self._json, _finite(values))


def check_file(path: Path, option: str) -> None:
    """Refuses a place where no file can be written.

    Raises:
        ConfigError: It is a folder, or its folder cannot be written to.
    """
    try:
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if path.is_dir():
            raise ConfigError(f"{option} {path} is a folder; give a file.")
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ConfigError(f"{option} {path} cannot be written: {parent} is not a folder that can be written to.")
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written: {error.strerror}.") from error


def renamed(new: str, value: Value | None, *, quiet: bool = False, **old: Value | None) -> Value | None:
    """The value of an option that had other names: they work with a note, for one version.

    Args:
        new: The option, as ``--detections``.
        value: What was given under that name.
        quiet: Leave the note out.
        **old: What was given under each old name, which is written without dashes: ``boxes=boxes``.

    Raises:
        ConfigError: It was given under two names.
    """
    for name, given in old.items():
        if given is None:
            continue
        option = "--" + name.replace("_", "-")
        if value is not None:
            raise ConfigError(f"{option} is the old name of {new}; give only {new}.")
        if not quiet:
            err.print(f"note: {option} is now {new}; the old name works in this version only.", soft_wrap=True)
        value = given
    return value


def finite(value: float) -> float:
    """Callback of an option whose number must be finite: typer's bounds let NaN pass."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _finite(values: Any) -> Any:
    """The same with None for numbers that are not finite."""
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
