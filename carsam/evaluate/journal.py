"""Finished images of an evaluation, kept on disk so that an interrupted one goes on where it stopped.

A journal lies in a folder named by a key over everything that decides its numbers: contents of model and annotations,
settings, code, versions, threads. Each line is one image with a checksum, written when the image is finished. A line
that is damaged or cut off, or whose image file has changed since, counts as not there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import nn

from carsam.models.forward import runs_in
from carsam.output.lock import InUseError, locked
from carsam.output.user_cache import CACHE_VARIABLE
from carsam.plugins import outside_sources
from carsam.quantizers.grid import Grid
from carsam.run.store import fingerprint, model_fingerprint

logger = logging.getLogger(__name__)

_LINES, _ABOUT, _LOCK = "images.jsonl", "about.json", "lock"
# Nobody goes on with an evaluation of last month; its journal would stay for ever.
_KEPT_SECONDS = 30 * 24 * 3600
_KEY, _CHECKSUM = 32, 16
_PACKAGES = ("torch", "transformers", "numpy", "pillow", "pycocotools")


class Journals:
    """The journals of a command, in one folder, while a ``with`` block runs; an error in the block leaves them there.

    Args:
        folder: Where they lie; created when needed.
        restart: Discard what an interrupted run left.
        note: Told a line where something is taken over, or could not be.

    Attributes:
        taken_over: Images that the evaluation opened last had from an interrupted run.
    """

    def __init__(self, folder: str | Path, *, restart: bool = False, note: Callable[[str], None] | None = None):
        self._folder = Path(folder)
        self._restart = restart
        self._note = note or (lambda _: None)
        self._opened: list[Journal] = []
        self.taken_over = 0

    def open(self, parts: Mapping[str, Any], n_images: int) -> Journal | None:
        """The journal of an evaluation, with what an interrupted run has left there.

        Args:
            parts: Everything that decides its numbers, by a name for people, as JSON-able values.
            n_images: Images that the evaluation has.

        Returns:
            The journal; None, after a logged warning, where nothing can be kept.
        """
        self.taken_over = 0
        digests = {name: fingerprint(value) for name, value in parts.items()}
        folder = self._folder / fingerprint(digests)[:_KEY]
        try:
            self._clear_old()
            folder.mkdir(parents=True, exist_ok=True)
            journal = Journal(folder, n_images)
            if self._restart:
                journal.discard()
            elif journal.n_kept:
                self.taken_over = journal.n_kept
                self._note(f"{journal.n_kept} of {n_images} images are kept from an interrupted evaluation")
            else:
                self._tell_what_differs(digests)
            (folder / _ABOUT).write_text(json.dumps(digests), encoding="utf-8")
        except InUseError:
            logger.warning("another carsam runs the same evaluation; this one cannot be resumed if it is interrupted")
            return None
        except (OSError, NotImplementedError) as error:  # filelock: a file system without locks
            logger.warning(
                "cannot keep finished images in %s (%s): an interrupted evaluation will start from the beginning. "
                "Set %s to a folder that can be written to.",
                self._folder,
                getattr(error, "strerror", None) or error,
                CACHE_VARIABLE,
            )
            return None
        self._opened.append(journal)
        return journal

    @property
    def kept(self) -> tuple[int, int]:
        """Images kept and images in all, of the evaluation opened last."""
        return (self._opened[-1].n_kept, self._opened[-1].n_images) if self._opened else (0, 0)

    def __enter__(self) -> Journals:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes all journals. Without an error they go: their numbers are safe elsewhere."""
        for journal in self._opened:
            journal.close()
            if kind is None:
                _remove(journal.folder)
        self._opened.clear()
        if kind is None:
            with suppress(OSError):
                self._folder.rmdir()  # only if it is empty

    def _others(self) -> list[Path]:
        """Folders of other journals: those whose name and files are as carsam makes them."""
        opened = {journal.folder for journal in self._opened}
        found = [path.parent for path in self._folder.glob(f"{'[0-9a-f]' * _KEY}/{_LINES}")]
        return [folder for folder in found if folder not in opened and (folder / _ABOUT).is_file()]

    def _clear_old(self) -> None:
        for folder in self._others():
            with suppress(OSError):
                if time.time() - (folder / _LINES).stat().st_mtime > _KEPT_SECONDS:
                    _remove(folder)

    def _tell_what_differs(self, digests: dict[str, str]) -> None:
        """Names what keeps an interrupted evaluation of the same annotations or model from being continued."""
        closest: list[str] | None = None
        for folder in self._others():
            try:
                other = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
                if (folder / _LINES).stat().st_size == 0:
                    continue
            except (OSError, ValueError):
                continue
            if not isinstance(other, dict) or other.get("kind") != digests.get("kind"):
                continue
            differing = [name for name, digest in digests.items() if other.get(name) != digest]
            if differing and len(differing) <= 2 and (closest is None or len(differing) < len(closest)):
                closest = differing
        if closest:
            self._note(f"an interrupted evaluation is kept, but does not fit: another {' and '.join(closest)}")


class Journal:
    """One evaluation's finished images. Reads a line at a time: memory does not grow with what is kept.

    Args:
        folder: Its own; exists.
        n_images: Images that the evaluation has.

    Raises:
        OSError: The folder cannot be written to.
        InUseError: Another process has it open.
    """

    def __init__(self, folder: Path, n_images: int):
        self.folder = folder
        self.n_images = n_images
        self._held = ExitStack()
        self._held.enter_context(locked(folder / _LOCK, f"the journal {folder}"))
        self._offsets: dict[int, int] = {}
        try:
            self._file: BinaryIO | None = (folder / _LINES).open("a+b")
            self._read_offsets()
        except OSError:
            self._held.close()
            raise

    @property
    def n_kept(self) -> int:
        """Finished images on disk."""
        return len(self._offsets)

    def get(self, index: int, image: Path) -> Any | None:
        """What was kept for an image; None where there is nothing, or the image's file has changed."""
        if self._file is None or index not in self._offsets:
            return None
        self._file.seek(self._offsets[index])
        entry = _parse(self._file.readline())
        if entry is None or entry["image"] != index or entry["contents"] != _contents(image):
            del self._offsets[index]
            return None
        return entry["values"]

    def add(self, index: int, image: Path, values: Any) -> None:
        """Keeps an image's result. Where the disk is full, the evaluation goes on without (a logged warning)."""
        if self._file is None:
            return
        line = json.dumps({"image": index, "contents": _contents(image), "values": values}, allow_nan=False).encode()
        try:
            offset = self._file.seek(0, os.SEEK_END)
            self._file.write(_checksum(line) + b" " + line + b"\n")
            self._file.flush()
            self._offsets[index] = offset
        except OSError as error:
            logger.warning("cannot keep finished images in %s (%s); going on without", self.folder, error.strerror)
            with suppress(OSError):
                self._file.close()
            self._file = None

    def discard(self) -> None:
        """Forgets everything kept.

        Raises:
            OSError: The file cannot be written.
        """
        self._offsets.clear()
        if self._file is not None:
            self._file.truncate(0)

    def close(self) -> None:
        """Closes the file and lets others open it."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._held.close()

    def _read_offsets(self) -> None:
        self._file.seek(0)
        offset, line = 0, b""
        for line in self._file:
            entry = _parse(line)
            if entry is not None and 0 <= entry["image"] < self.n_images:
                self._offsets[entry["image"]] = offset
            offset += len(line)
        if line and not line.endswith(b"\n"):
            self._file.write(b"\n")  # what was cut off ends here
            self._file.flush()


def evaluation_parts(
    model: nn.Module, kind: str, files: Mapping[str, str | Path | None], **settings: Any
) -> dict[str, Any]:
    """Everything that decides an evaluation's numbers, for :meth:`Journals.open`.

    Args:
        model: The model, in the state in which it will be evaluated.
        kind: What is evaluated.
        files: Annotation files by a name for people; their contents count, not their paths.
        settings: Whatever else decides the numbers.
    """
    contents = {name: None if path is None else _contents(Path(path)) for name, path in files.items()}
    versions = {name: version(name) for name in _PACKAGES}
    return {
        "kind": kind,
        "model": [model_fingerprint(model), str(model), model.config.to_json_string(use_diff=False)],
        **contents,
        "settings": settings,
        "device or thread count": [str(model.device.type), torch.get_num_threads(), _runtime(model)],
        "version of carsam, torch or transformers": [_code(model), versions],
    }


def _runtime(model: nn.Module) -> str:
    """Where a model computes; torch's integer layers are seen in the model itself."""
    halves = runs_in(model)
    return "torch" if halves is None else halves.runtime


def _remove(folder: Path) -> None:
    """Removes a journal, and nothing that somebody else may have put beside it."""
    with suppress(OSError):
        for name in (_LINES, _ABOUT, _LOCK):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _code(model: nn.Module) -> str:
    """SHA-256 of carsam's sources, and of those of other packages whose grids the model has."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode())
        digest.update(path.read_bytes())
    for name, path in outside_sources({type(part) for part in model.modules() if isinstance(part, Grid)}):
        digest.update(name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _contents(path: Path) -> str:
    """SHA-256 of a file; of nothing where it cannot be read, which reading it will tell."""
    digest = hashlib.sha256()
    with suppress(OSError), path.open("rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()


def _checksum(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest()[:_CHECKSUM].encode()


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line's entry; None where it is damaged or cut off."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if checksum != _checksum(text):
        return None
    try:
        entry = json.loads(text)
    except ValueError:
        return None
    whole = isinstance(entry, dict) and isinstance(entry.get("image"), int) and {"contents", "values"} <= set(entry)
    return entry if whole else None
