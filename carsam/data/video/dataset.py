"""Videos with masks: DAVIS's folders (one mask file a frame) and SA-V's (a folder of masks an object)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from carsam.data.video.frames import Video, check_steps, in_order, open_video
from carsam.data.video.masks import read_mask, read_single_mask
from carsam.errors import DataError

DAVIS, SA_V = "davis", "sa-v"
# Folders of frames and of masks, by the names that the data sets use.
_FRAMES, _MASKS = ("JPEGImages", "JPEGImages_24fps"), ("Annotations", "Annotations_6fps")
_RESOLUTIONS = ("480p", "Full-Resolution", "1080p")


@dataclass(frozen=True)
class FollowedObject:
    """An object with its masks.

    Attributes:
        number: Its number in masks, from 1; in SA-V's form, from 0.
        name: Its folder in SA-V's form; the number otherwise.
        masks: Mask file by index of the frame, in order. The first one is the prompt.
    """

    number: int
    name: str
    masks: Mapping[int, Path]

    @property
    def start(self) -> int:
        """Index of the frame whose mask is the prompt."""
        return next(iter(self.masks))

    @property
    def scored(self) -> tuple[int, ...]:
        """Frames that count: those with a mask, without the first and the last, as DAVIS and SA-V do."""
        return tuple(self.masks)[1:-1]


@dataclass(frozen=True)
class AnnotatedVideo:
    """A video with the objects to follow.

    Attributes:
        name: Of its folder.
        video: Its frames.
        form: ``davis`` or ``sa-v``.
        objects: In order of their numbers.
    """

    name: str
    video: Video
    form: str
    objects: tuple[FollowedObject, ...]

    def masks(self, index: int) -> dict[int, np.ndarray]:
        """The true masks on a frame, ``(h, w)`` bool, of every object that has a mask file there, by number.

        Raises:
            DataError: A file is damaged or has another size than the frame.
        """
        files = {followed.number: followed.masks[index] for followed in self.objects if index in followed.masks}
        if self.form == SA_V:
            return {number: read_single_mask(path, self.video.size) for number, path in files.items()}
        if not files:
            return {}
        numbers = read_mask(next(iter(files.values())), self.video.size)  # all objects lie in one file
        return {number: numbers == number for number in files}


@dataclass(frozen=True)
class VideoSet:
    """A data set of videos.

    Attributes:
        root: Its folder.
        form: ``davis`` or ``sa-v``.
        frames, masks: Folders of all videos' frames and masks.
        names: Of the videos.
    """

    root: Path
    form: str
    frames: Path
    masks: Path
    names: tuple[str, ...]

    def open(self, name: str, limit: int | None = None) -> AnnotatedVideo:
        """Opens one video: lists frames and masks, reads all sizes and the first masks.

        Args:
            name: One of ``names``.
            limit: Only so many of its first frames.

        Raises:
            DataError: Frames or masks are missing, sizes differ, or a first mask is empty.
        """
        video = open_video(self.frames / name, limit)
        folder = self.masks / name
        if self.form == DAVIS:
            masks = _by_frame(folder, video, limit)
            start = next(iter(masks))
            numbers = np.unique(read_mask(masks[start], video.size))
            objects = tuple(FollowedObject(int(n), str(n), masks) for n in numbers if n)
            if not objects:
                raise DataError(_empty(masks[start]))
        else:
            objects = tuple(
                FollowedObject(number, entry.name, _by_frame(entry, video, limit))
                for number, entry in enumerate(_object_folders(folder))
            )
            for followed in objects:
                if not read_single_mask(followed.masks[followed.start], video.size).any():
                    raise DataError(_empty(followed.masks[followed.start]))
        for followed in objects:
            if not followed.scored:
                raise DataError(
                    f"{folder} has {len(followed.masks)} masks of object {followed.name}; without the first and the "
                    "last one nothing is left to score, so at least three are needed."
                )
        return AnnotatedVideo(name, video, self.form, objects)


def find_videos(root: str | Path) -> VideoSet:
    """Finds out how a data set of videos is laid out.

    DAVIS: ``JPEGImages/[480p/]VIDEO/00000.jpg`` and ``Annotations/[480p/]VIDEO/00000.png``. SA-V:
    ``JPEGImages_24fps/VIDEO/00000.jpg`` and ``Annotations_6fps/VIDEO/000/00000.png``, a folder for every object.

    Raises:
        DataError: It is neither, a video has no masks, or the two forms are mixed.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}.")
    frames, masks = (_first(root, names) for names in (_FRAMES, _MASKS))
    for resolution in _RESOLUTIONS:
        if (frames / resolution).is_dir() and (masks / resolution).is_dir():
            frames, masks = frames / resolution, masks / resolution
            break
    names = tuple(sorted(path.name for path in masks.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if not names:
        raise DataError(f"{masks} holds no folders of masks, one for each video.")
    forms = {}
    for name in names:
        if not (frames / name).is_dir():
            raise DataError(f"the video {name} has masks in {masks}, but no frames in {frames / name}.")
        inside = list((masks / name).iterdir())
        forms[name] = SA_V if any(path.is_dir() for path in inside) else DAVIS
    if len(set(forms.values())) > 1:
        first = {form: next(name for name in names if forms[name] == form) for form in (DAVIS, SA_V)}
        raise DataError(
            f"{masks} mixes two forms: {first[DAVIS]} has one mask file a frame, {first[SA_V]} a folder an object."
        )
    return VideoSet(root, forms[names[0]], frames, masks, names)


def holds_videos(root: str | Path) -> bool:
    """Whether a folder is laid out as a data set of videos with masks."""
    return all(any((Path(root) / name).is_dir() for name in names) for names in (_FRAMES, _MASKS))


def _first(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(
        f"{root} has no folder {names[0]} (or {names[1]}); give the root of a data set in DAVIS's form, with "
        "JPEGImages and Annotations, or in SA-V's, with JPEGImages_24fps and Annotations_6fps."
    )


def _object_folders(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.name)


def _by_frame(folder: Path, video: Video, limit: int | None) -> dict[int, Path]:
    """Mask files by index of the frame."""
    paths = in_order([path for path in folder.glob("*.png") if not path.name.startswith(".")])
    if not paths:
        raise DataError(f"{folder} holds no masks (.png).")
    check_steps([path.name for path in paths], f"the masks {folder}", "mask")
    index = {name: place for place, name in enumerate(video.names)}
    found = {index[path.stem]: path for path in paths if path.stem in index}
    left_out = [path for path in paths if path.stem not in index]
    # With a limit, masks of later frames are meant to be left out.
    if left_out and (limit is None or not found):
        raise DataError(f"the mask {left_out[0]} has no frame of that name in {video.folder}; is the frame missing?")
    return dict(sorted(found.items()))


def _empty(path: Path) -> str:
    return (
        f"the first mask {path} is empty: there is nothing to follow. An object is followed from its first mask on; "
        "remove the empty ones before it, or draw it."
    )
