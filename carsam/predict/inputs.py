"""The images that a command line names: files, folders and patterns."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from carsam.data.images.file import Header, image_suffixes, is_image, read_header, unreadable_suffix
from carsam.data.images.reading import list_images
from carsam.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Photo:
    """An image file to predict.

    Attributes:
        path: The file.
        subfolder: Where its outputs go below the output folder: its place below the input that named it.
        size: ``(h, w)`` of the image as it is predicted; ``(0, 0)`` before the header was read.
        upright: Whether the image is turned as its EXIF orientation says.
        header: What the file says before its pixels; None before it was read.
    """

    path: Path
    subfolder: Path = Path()
    size: tuple[int, int] = (0, 0)
    upright: bool = True
    header: Header | None = None


def find_photos(inputs: Iterable[str]) -> list[Photo]:
    """The files that the inputs name, in their order, each once.

    A folder stands for the images directly in it; a pattern (``*``, ``?``, ``**`` for any depth) for those that match.

    Raises:
        DataError: An input names nothing.
    """
    photos: dict[Path, Photo] = {}
    for text in inputs:
        for photo in _expand(text):
            photos.setdefault(photo.path.resolve(), photo)
    return list(photos.values())


def _expand(text: str) -> list[Photo]:
    path = Path(os.path.expanduser(text))
    # os.path answers False where pathlib raises: for names that are too long, or hold a NUL.
    if text and os.path.isdir(path):
        return [Photo(file) for file in list_images(path)]
    if text and os.path.exists(path):
        return [Photo(path)]
    if not glob.has_magic(text):
        raise DataError(f"there is no image or folder {text!r}.")
    found = (Path(name) for name in sorted(glob.glob(str(path), recursive=True)))
    files = [file for file in found if file.is_file()]
    images = [file for file in files if file.suffix.lower() in image_suffixes() or is_image(file)]
    left_out = [file for file in files if unreadable_suffix(file.suffix.lower())]
    fix = f"{unreadable_suffix(left_out[0].suffix.lower())}" if left_out else ""
    if not images:
        hint = f" It matches {shown(left_out[0])}: {fix}." if left_out else " Quote the pattern, and try a folder."
        raise DataError(f"no image matches {text!r}.{hint}")
    if left_out:
        logger.warning("%d files that match %s cannot be read, such as %s; %s.", len(left_out), text, left_out[0], fix)
    root = _root(path)
    return [Photo(file, file.parent.relative_to(root)) for file in images]


def _root(pattern: Path) -> Path:
    """The folders of a pattern before its first wildcard."""
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def measure(photos: Iterable[Photo]) -> tuple[list[Photo], list[tuple[Photo, str]]]:
    """Reads the sizes in the files' headers.

    Returns:
        The photos with their sizes, and those that are no readable image with the reason.
    """
    good, bad = [], []
    for photo in photos:
        try:
            header = read_header(photo.path)
            good.append(replace(photo, size=header.upright_size, header=header))
        except DataError as error:
            bad.append((photo, str(error)))
    return good, bad


def shown(path: str | os.PathLike[str]) -> str:
    """A path as text that any terminal can print."""
    text = os.fsencode(path).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
