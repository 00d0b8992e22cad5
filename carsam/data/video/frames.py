"""A video as a folder of frames: their order and size, checked before any of them is decoded."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from carsam.data.images.file import read_header
from carsam.data.images.reading import list_images, read_image
from carsam.errors import DataError

# Video files are asked for often; carsam reads frames.
_MOVIES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"})


@dataclass(frozen=True)
class Video:
    """The frames of a video.

    Attributes:
        folder: Where they lie.
        paths: One file a frame, in order.
        size: ``(h, w)`` of every frame, in pixels.
    """

    folder: Path
    paths: tuple[Path, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the frames without suffix; masks carry the same ones."""
        return tuple(path.stem for path in self.paths)

    def frame(self, index: int) -> np.ndarray:
        """A frame as ``(h, w, 3)`` uint8 RGB.

        Raises:
            DataError: Its file is damaged, or has another size than it had when the video was opened.
        """
        path = self.paths[index]
        pixels = read_image(path)
        if pixels.shape[:2] != self.size:
            raise DataError(_other_size(path, pixels.shape[:2], self.paths[0], self.size))
        return pixels


def open_video(folder: str | Path, limit: int | None = None) -> Video:
    """Opens a folder of frames.

    Frames are sorted by the number that their names end in, or by name where there is none. Numbers must go up by the
    same step: a frame left out would silently be a jump.

    Args:
        folder: The folder.
        limit: Only so many of the first frames.

    Raises:
        DataError: There is no such folder, it holds no image, a frame is missing, two have one name, or sizes differ.
    """
    folder = Path(folder)
    if folder.suffix.lower() in _MOVIES and not folder.is_dir():
        raise DataError(
            f"{folder} is a video file; carsam reads folders of frames. Extract them first, for example with "
            f"`ffmpeg -i {folder.name} -q:v 2 -start_number 0 frames/%05d.jpg`."
        )
    paths = in_order(list_images(folder))
    check_steps([path.name for path in paths], f"the video {folder}", "frame")
    paths = paths[:limit]
    first = read_header(paths[0]).upright_size
    for path in paths[1:]:
        size = read_header(path).upright_size
        if size != first:
            raise DataError(_other_size(path, size, paths[0], first))
    return Video(folder, tuple(paths), first)


def in_order(paths: Sequence[Path]) -> list[Path]:
    """Files sorted by the number that their names end in; by name where one of them has none.

    Raises:
        DataError: Two files have the same name but for their suffix.
    """
    stems: dict[str, Path] = {}
    for path in paths:
        if other := stems.get(path.stem):
            raise DataError(f"{other} and {path.name} are the same frame twice; remove one of them.")
        stems[path.stem] = path
    if any(number(path.name) is None for path in paths):
        return sorted(paths, key=lambda path: path.name)
    return sorted(paths, key=lambda path: (number(path.name), path.name))


def number(name: str) -> int | None:
    """The number that a file's name ends in before its suffix; None where it ends in none."""
    found = re.search(r"(\d{1,18})$", Path(name).stem)
    return None if found is None else int(found[1])


def check_steps(names: Sequence[str], where: str, noun: str) -> None:
    """Refuses sorted files whose numbers have a gap.

    Args:
        names: File names in order.
        where: What they lie in, for the message.
        noun: What one of them is.

    Raises:
        DataError: Names the first file that is missing, or two that have one number.
    """
    numbers = [number(name) for name in names]
    if len(names) < 3 or None in numbers:
        return
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    step = min(steps)
    for index, found in enumerate(steps):
        if found == 0:
            raise DataError(f"{where} has two files of one number: {names[index]} and {names[index + 1]}.")
        if found != step:
            missing = numbers[index] + step
            raise DataError(
                f"{where} has no {noun} {missing}: after {names[index]} comes {names[index + 1]}, while others go up "
                f"by {step}. Add it, or number the {noun}s again if nothing is missing."
            )


def _other_size(path: Path, size: tuple[int, ...], first: Path, wanted: tuple[int, ...]) -> str:
    return (
        f"the frame {path} has {size[1]} × {size[0]} pixels, but {first.name} has {wanted[1]} × {wanted[0]}; "
        "all frames of a video must have one size."
    )
