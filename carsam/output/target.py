"""The folder that a run writes: checked before the work, locked during it, replaced whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from carsam.errors import CarsamError
from carsam.output.files import LEFTOVER, hidden
from carsam.output.lock import locked
from carsam.pack.folder import CARD, CHECKSUMS, CONFIG, REQUIRED, RESULTS, WEIGHTS, is_packed
from carsam.pack.model_card import is_model_card

logger = logging.getLogger(__name__)

_DIAGNOSIS = "diagnosis"
# What carsam writes into a packed folder. Of these, the files that SHA256SUMS can name are carsam's where it does.
_SUMMED = frozenset({*REQUIRED, CARD, "processor_config.json"})
_BESIDE = frozenset({CHECKSUMS, RESULTS, "report.html"})
_NAMES_SHOWN = 5


class Output:
    """The output folder of a run. Use it as a context manager: the place is locked meanwhile.

    A link to a packed folder stands for the folder that it points to. On entering, what killed processes left there is
    cleared, and an old model that one of them had moved aside is put back.

    Args:
        out: The folder to write.
        overwrite: Replace a packed model that is there.
        inputs: Files and folders that the run reads, by what they are for people; they must not be written into.
        finished: A packed model that is there may be the end of an interrupted run, so it is no error yet.

    Attributes:
        path: As the user gave it.
        target: Without links.
        partial: Where finished units are kept meanwhile.
        overwrite: As given; settable.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        overwrite: bool = False,
        inputs: Mapping[str, str | Path | None] | None = None,
        finished: bool = False,
    ):
        self.path = Path(out)
        self.target = Path(os.path.realpath(out))
        self.partial = self.target.parent / f"{self.target.name}.partial"
        self.overwrite, self._inputs, self._finished = overwrite, dict(inputs or {}), finished
        self._held = ExitStack()

    def __enter__(self) -> Output:
        with self._held:  # let go again if anything fails
            self._check_place()
            self._lock()
            self._recover()
            self.check()
            self._held = self._held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def check(self) -> None:
        """Refuses a place that must not be replaced.

        Raises:
            CarsamError: It exists without ``overwrite``, is no packed model, or holds files that carsam did not write.
        """
        if not os.path.lexists(self.target):
            return
        if not self.overwrite:
            if self._finished and is_ours(self.target):
                return
            raise CarsamError(f"{self.path} exists already; choose another folder or allow overwriting (--overwrite).")
        if not self.target.is_dir() or (any(self.target.iterdir()) and not is_ours(self.target)):
            # Overwriting removes the whole folder: a slip like --out . must not take a user's files with it.
            raise CarsamError(f"{self.path} is not a packed model, so it is not overwritten; choose another folder.")
        if found := foreign_files(self.target):
            shown = ", ".join(found[:_NAMES_SHOWN])
            more = f" and {len(found) - _NAMES_SHOWN} more" if len(found) > _NAMES_SHOWN else ""
            raise CarsamError(
                f"{self.path} holds files that carsam did not write, so it is not overwritten: {shown}{more}. "
                "Move them elsewhere, or choose another folder."
            )

    def _check_place(self) -> None:
        if os.path.islink(self.path) and not self.target.exists():
            raise CarsamError(
                f"{self.path} is a link to {os.readlink(self.path)}, which does not exist. Remove the link, or choose "
                "another folder."
            )
        if not self.target.name:
            raise CarsamError(f"{self.path} cannot be written; give a folder with a name.")
        if Path.cwd().is_relative_to(self.target):
            raise CarsamError(f"{self.path} is the current folder or holds it; choose another folder.")
        for what, given in self._inputs.items():
            place = Path(os.path.realpath(given)) if given is not None and os.path.exists(given) else None
            if place is None:
                continue
            # A folder of images may hold the output: images are read from it directly, never from folders in it.
            if self.target == place or (what != "images" and self.target.is_relative_to(place)):
                raise CarsamError(f"{self.path} is or lies in the {what} {given}; choose a folder outside it.")
            if place.is_relative_to(self.target):
                raise CarsamError(f"{self.path} holds the {what} {given}; choose another folder.")

    def _lock(self) -> None:
        """Creates the parent folder where it is missing, and holds the lock in it."""
        parent = self.target.parent
        missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._held.callback(_remove_empty, missing)
            self._held.enter_context(locked(hidden(self.target, "lock"), str(self.path)))
        except OSError as error:
            raise CarsamError(
                f"cannot write {self.path}: {error.strerror or error} ({parent}). Nothing was computed; choose a "
                "folder that can be written to and has space, with --out."
            ) from error

    def _recover(self) -> None:
        """Ends what a killed process left half done. Nobody else is at it: this process holds the lock."""
        olds = self._aside("old")
        for old in sorted(olds, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            if not os.path.lexists(self.target):
                os.replace(old, self.target)
                logger.warning("an interrupted run had moved %s aside; it is back.", self.path)
            else:
                shutil.rmtree(old, ignore_errors=True)
        for temporary in self._aside("tmp"):
            shutil.rmtree(temporary, ignore_errors=True)

    def _aside(self, end: str) -> list[Path]:
        """Folders that processes moved aside or were writing, by carsam's own names."""
        before = hidden(self.target, "").name
        pattern = re.compile(rf"{re.escape(before)}\d+\.{end}", re.DOTALL)
        with os.scandir(self.target.parent) as entries:
            return [Path(e.path) for e in entries if pattern.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]

    @contextmanager
    def replacing(self, kept: str = "") -> Iterator[Replacement]:
        """Writes the folder: it is moved into place by :meth:`Replacement.move`, or at the end of the block.

        Until the block ends, an old folder stays aside; any error in the block puts it back.

        Args:
            kept: What is kept of the run if this fails, as a sentence.

        Raises:
            CarsamError: The place changed meanwhile, the disk is full, or the place is not writable.
        """
        self.check()
        replacement = Replacement(self.target)
        try:
            with replacement:
                yield replacement
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            there = "The model that was there is still there" if replacement.had_old else "Nothing was left there"
            raise CarsamError(
                f"cannot write {self.path}: {reason}. {there}; free space and run again. {kept}".rstrip()
            ) from error


class Replacement:
    """A folder on its way to its place, as a context manager: moved there at the end of the block, or not at all.

    Attributes:
        folder: Where to write; not there any more once moved.
        done: Nothing can fail any more: the old folder goes.
        had_old: Whether a folder was there before.
        made: ``folder`` was made.
    """

    def __init__(self, target: Path):
        self._target = target
        self.folder = hidden(target, f"{os.getpid()}.tmp")
        self._old = hidden(target, f"{os.getpid()}.old")
        self._moved = self.done = self.made = False
        self.had_old = target.exists()

    def __enter__(self) -> Replacement:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.made = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.move()
                self.done = True
        finally:
            self._close()

    def move(self) -> None:
        """Moves the folder into place; the old one waits aside."""
        if self._moved:
            return
        if self._target.exists():
            os.replace(self._target, self._old)
        os.replace(self.folder, self._target)
        self._moved = True

    def _close(self) -> None:
        """Removes what is not needed any more; puts the old folder back where the new one is not done."""
        if not self.done:
            # Judged by what lies there, not by flags: an interrupt may have come between a move and its flag.
            if self._old.exists():
                if self._target.exists():
                    shutil.rmtree(self._target, ignore_errors=True)
                os.replace(self._old, self._target)
            elif self.made and not self.had_old and not self.folder.exists():
                shutil.rmtree(self._target, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self._old, ignore_errors=True)


@contextmanager
def replaced_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a folder beside ``target`` and moves it there when the block ends without an error.

    Raises:
        CarsamError: See :class:`Output`.
    """
    with Output(target, overwrite=overwrite) as output, output.replacing() as replacement:
        yield replacement.folder


def is_ours(folder: Path) -> bool:
    """Whether carsam wrote a folder: its ``config.json`` says that it holds a packed carsam model."""
    return folder.is_dir() and is_packed(folder)


def foreign_files(folder: Path) -> list[str]:
    """Names in a packed folder that carsam did not write."""
    try:
        lines = (folder / CHECKSUMS).read_bytes()[: 2**20].decode(errors="replace").splitlines()
    except OSError:
        lines = []
    summed = {line.partition("  ")[2] for line in lines} | {CONFIG, WEIGHTS}
    ours = (_SUMMED & summed) | _BESIDE
    found = []
    for path in sorted(folder.iterdir()):
        if path.name == _DIAGNOSIS and path.is_dir() and not path.is_symlink():
            found += _foreign_pictures(path)
        elif path.is_dir() or not (
            path.name in ours or (path.name == CARD and is_model_card(path)) or LEFTOVER.fullmatch(path.name)
        ):
            found.append(path.name)
    return found


def _foreign_pictures(diagnosis: Path) -> list[str]:
    """Files in a diagnosis that its ``diagnosis.json`` does not name."""
    listing = diagnosis / f"{_DIAGNOSIS}.json"
    try:
        text = listing.read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    found = []
    for path in sorted(diagnosis.rglob("*")):
        name = path.relative_to(diagnosis).as_posix()
        named = path == listing or json.dumps(name) in text or json.dumps(name, ensure_ascii=False) in text
        if not path.is_dir() and not named:
            found.append(f"{_DIAGNOSIS}/{name}")
    return found


def _remove_empty(folders: list[Path]) -> None:
    """Removes folders that were made for an output that never came; deepest first."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
