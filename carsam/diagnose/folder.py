"""The diagnosis folder: ``diagnosis.json`` and pictures, written beside its place and moved there when whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from carsam.errors import CarsamError
from carsam.output.target import Replacement

if TYPE_CHECKING:
    from PIL import Image

    from carsam.diagnose.results import Diagnosis

FOLDER, FILE = "diagnosis", "diagnosis.json"


def check_target(target: Path) -> None:
    """Refuses a place that holds something other than a diagnosis, or cannot be written to.

    Raises:
        CarsamError: It is such a place.
    """
    if target.exists() and not (target.is_dir() and ((target / FILE).is_file() or not any(target.iterdir()))):
        # The whole folder is replaced: a slip like --out . must not take a user's files with it.
        raise CarsamError(f"{target} is not a diagnosis, so it is not overwritten; choose another folder with --out.")
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CarsamError(f"cannot write {target}: {parent} is not a writable folder; choose another with --out.")


def write_folder(target: Path, diagnosis: Diagnosis, pictures: dict[str, Image.Image], quality: int) -> None:
    """Writes a diagnosis, replacing an earlier one at once or not at all.

    Args:
        target: The folder.
        diagnosis: Goes to ``diagnosis.json``.
        pictures: By path relative to the folder.
        quality: Quality of the JPEG files.

    Raises:
        CarsamError: The disk is full, or the place is not writable; an earlier diagnosis is still there.
    """
    check_target(target)
    target = target.absolute()
    try:
        with Replacement(target) as replacement:
            for name, picture in pictures.items():
                path = replacement.folder / name
                path.parent.mkdir(exist_ok=True)
                picture.save(path, quality=quality)
            text = json.dumps(diagnosis.to_dict(), indent=1, allow_nan=False)
            (replacement.folder / FILE).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise CarsamError(f"cannot write {target}: {error.strerror or error}. Nothing new was left there.") from error
