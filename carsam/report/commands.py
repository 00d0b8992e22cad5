"""Commands that can be pasted into a shell: quoted, with words in capitals for what the folder does not tell."""

from __future__ import annotations

import shlex
from pathlib import PurePath, PureWindowsPath
from typing import Any

from carsam.report.order import mapping
from carsam.report.source import Source

FLOAT, IMAGES, FILE, DATA, DATA_FILE = "FLOAT", "IMAGES", "INSTANCES.json", "CALIBRATION_IMAGES", "CALIBRATION.json"
DETECTIONS = "DETECTIONS.json"
PLACEHOLDERS = {
    FLOAT: "the float model: a Hub id, a folder or a .pth file",
    DATA: "the folder of the calibration images",
    DATA_FILE: "their COCO file",
    IMAGES: "the folder of the images to evaluate",
    FILE: "their COCO file",
    DETECTIONS: "the COCO detection results whose boxes are the prompts",
    "FLOAT.json": "the scores of the float model, which the command before it writes",
}


def quoted(text: str) -> str:
    """A word of a command; a name that looks like an option is made a path."""
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def stored(value: Any, placeholder: str) -> str:
    """A path as the folder notes it, quoted; the placeholder where there is none that means the same elsewhere.

    An absolute path is a place on one machine, and a bare name is what is kept of such a place.
    """
    if not isinstance(value, str) or not value or not value.isprintable() or value.endswith("…"):
        return placeholder
    if (
        "/" not in value
        or PurePath(value).is_absolute()
        or PureWindowsPath(value).is_absolute()
        or value.startswith("~")
    ):
        return placeholder
    return quoted(value)


def float_model(source: Source) -> str:
    """The float model, as the recipe names it."""
    return stored(source.recipe.get("model"), FLOAT)


def quantize_command(source: Source, out: str = "AGAIN") -> str:
    """The command that makes the folder again, with its recipe."""
    calibration = mapping(source.recipe.get("calibration"))
    command = f"carsam quantize {float_model(source)} --recipe {quoted(f'{source.name}/recipe.yaml')}"
    command += f" --data {stored(calibration.get('images'), DATA)}"
    if calibration.get("coco"):
        command += f" --data-coco {stored(calibration['coco'], DATA_FILE)}"
    return f"{command} --out {out}"


def evaluate_command(source: Source, model: str | None = None) -> str:
    """The command that scores the model as it was scored before, or for the first time.

    Args:
        source: The folder.
        model: Another model than the packed one, quoted.
    """
    data = source.evaluation
    command = f"carsam evaluate {model or quoted(source.name)} --coco {stored(data.get('coco'), FILE)}"
    command += f" --images {stored(data.get('images'), IMAGES)}"
    if data.get("boxes"):
        command += f" --detections {stored(data['boxes'], DETECTIONS)}"
    limit = data.get("limit")
    if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
        command += f" --limit {limit}"
    return command


def diagnose_command(source: Source) -> str:
    """The command that writes ``diagnosis``."""
    data = source.evaluation
    command = f"carsam diagnose {float_model(source)} {quoted(source.name)}"
    return f"{command} --images {stored(data.get('images'), IMAGES)} --coco {stored(data.get('coco'), FILE)}"


def report_command(source: Source, *, float_scores: bool = False) -> str:
    """The command that makes the page again."""
    scores = " --float-scores FLOAT.json" if float_scores else ""
    return f"carsam report {quoted(source.name)}{scores}"


def placeholders(commands: list[str]) -> list[tuple[str, str]]:
    """The words in capitals that stand in some commands, with what they stand for."""
    words = {word for command in commands for word in command.split()}
    return [(name, meaning) for name, meaning in PLACEHOLDERS.items() if name in words]
