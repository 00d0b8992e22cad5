"""The folder beside an output in which finished units are kept until the output is whole."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from carsam.errors import CarsamError
from carsam.output.files import LEFTOVER, hidden

logger = logging.getLogger(__name__)

MANIFEST = "carsam-run.json"
_UNIT_FILE = re.compile(r"[0-9a-f]{40}\.safetensors")
_MOST_BYTES = 2**20


class Partial:
    """Finished units of an unfinished quantization, with a list of everything that decides them.

    carsam touches only a folder that holds its own list, and in it only its own files.

    Args:
        folder: Where it lies.
        output: The output it belongs to; gives the name of a temporary folder.
    """

    def __init__(self, folder: Path, output: Path):
        self.folder, self._output = folder, output
        self._manifest: dict[str, Any] = {}

    def open(self, *, resume: bool, restart: bool) -> None:
        """Looks at what lies there, before any work.

        Raises:
            CarsamError: It is not carsam's; or it holds units, and the user has said neither to continue from them nor
                to discard them.
        """
        if not os.path.lexists(self.folder):
            if resume:
                logger.warning("there is nothing to resume in %s; starting from the first unit.", self.folder)
            return
        if not self.is_ours():
            raise CarsamError(
                f"{self.folder} is where carsam would keep finished units, but carsam did not make it. Move it, or "
                "choose another output folder."
            )
        self._manifest = self._read()
        if restart or not self.units():
            self.discard()
        elif not resume:
            raise CarsamError(
                f"{self.folder} holds an interrupted run: {self.summary()}. Continue it with --resume, or discard it "
                "with --restart (resume=True or restart=True in Python)."
            )

    def is_ours(self) -> bool:
        """Whether carsam made the folder."""
        return not self.folder.is_symlink() and (self.folder / MANIFEST).is_file()

    def units(self) -> list[Path]:
        """Files of finished units."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _UNIT_FILE.fullmatch(path.name))

    def summary(self) -> str:
        """``7 of 14 units are finished``."""
        count, total = len(self.units()), self._manifest.get("n_units")
        of = f" of {total}" if isinstance(total, int) else ""
        return f"{count}{of} unit{' is' if count == 1 and not of else 's are'} finished"

    def kept(self) -> str:
        """What an interruption leaves, as a sentence."""
        if not self.units():
            return "No unit was finished, so there is nothing to --resume; give the same command again."
        return f"{self.summary().capitalize()} and kept in {self.folder}; the same command with --resume continues."

    def check(self, ingredients: dict[str, Any]) -> None:
        """Compares what decides the kept units with what decides this run's.

        Args:
            ingredients: By name for people; text and numbers.

        Raises:
            CarsamError: Something differs, so that no kept unit could be used.
        """
        found = self._manifest.get("ingredients")
        if not self.units() or not isinstance(found, dict):
            return
        differing = [name for name in {**found, **ingredients} if found.get(name) != ingredients.get(name)]
        if differing:
            listed = "; ".join(_difference(name, found.get(name), ingredients.get(name)) for name in differing)
            raise CarsamError(
                f"cannot continue from {self.folder} ({self.summary()}), because this run differs: {listed}. Give the "
                "same command, model, data and versions as then, or discard what is kept with --restart."
            )

    def begin(self, ingredients: dict[str, Any], n_units: int) -> None:
        """Notes what decides this run; the folder is made with it when the first unit is finished."""
        self._manifest = {"about": "finished units of an interrupted carsam quantize", "n_units": n_units}
        self._manifest["ingredients"] = ingredients

    def create(self) -> None:
        """Makes the folder with its list, at once or not at all.

        Raises:
            OSError: The disk is full, or the place is not writable.
        """
        if (self.folder / MANIFEST).is_file():
            return
        temporary = hidden(self._output, f"{os.getpid()}.tmp")
        try:
            temporary.mkdir()
            text = json.dumps(self._manifest, indent=1, default=str)
            (temporary / MANIFEST).write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def discard(self) -> None:
        """Removes carsam's own files, and the folder where nothing else lies in it."""
        if not self.is_ours():
            return
        try:
            names = [path.name for path in self.folder.iterdir()]
            for name in [n for n in names if _UNIT_FILE.fullmatch(n) or LEFTOVER.fullmatch(n)]:
                (self.folder / name).unlink()
            (self.folder / MANIFEST).unlink()  # last: what remains after a kill is still marked
            if any(self.folder.iterdir()):
                logger.warning("%s holds files that carsam did not make; they stay there.", self.folder)
            else:
                self.folder.rmdir()
        except OSError as error:
            raise CarsamError(f"cannot remove finished units in {self.folder}: {error.strerror or error}.") from error

    def _read(self) -> dict[str, Any]:
        try:
            with (self.folder / MANIFEST).open("rb") as file:
                values = json.loads(file.read(_MOST_BYTES))
        except (OSError, ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            logger.warning("%s is damaged; only units that fit this run are used.", self.folder / MANIFEST)
            return {}
        return values


def _difference(name: str, there: Any, here: Any) -> str:
    """``bits (w6a6 there, w4a4 here)``; of a checksum only the name."""
    if any(isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) for value in (there, here)):
        return name
    return f"{name} ({_shown(there)} there, {_shown(here)} here)"


def _shown(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
