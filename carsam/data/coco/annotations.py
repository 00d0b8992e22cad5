"""Records of a COCO instances file, and the checks of every field that carsam uses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycocotools import mask as mask_utils

from carsam.errors import DataError

Id = int | str
Rle = dict[str, Any]

# Largest image in pixels, also for carsam.data.images.reading: reading 300 megapixels of RGB takes about 2.5 GB.
MAX_PIXELS = 300_000_000
# Beyond any image; coordinates of polygons are checked against the image itself.
MAX_COORDINATE = 1e7
MAX_ID = 2**63

_CROWD = {None: False, 0: False, 1: True, "0": False, "1": True, "": False, "false": False, "true": True}


@dataclass(frozen=True)
class CocoImage:
    """An entry of ``images``.

    Attributes:
        id: Number or text.
        file_name: As the file has it.
        height, width: In pixels of the image as it was annotated; None where the file does not say
            (:func:`carsam.data.coco.checks.check_images` reads the image's header).
        path: The image file, once it was found.
        upright: Whether the annotations follow the EXIF orientation; None until the image's header was read.
    """

    id: Id
    file_name: str
    height: int | None
    width: int | None
    path: Path | None = None
    upright: bool | None = None

    @property
    def size(self) -> tuple[int, int]:
        """``(h, w)``.

        Raises:
            DataError: The file does not say, and the image's header was not read.
        """
        if self.height is None or self.width is None:
            raise DataError(f"image {self.file_name!r} has no height and width; add them to the annotation file.")
        return self.height, self.width

    @property
    def known_size(self) -> tuple[int, int] | None:
        """``(h, w)``; None where it is not known yet."""
        return None if self.height is None or self.width is None else (self.height, self.width)


@dataclass(frozen=True)
class CocoCategory:
    """An entry of ``categories``."""

    id: Id
    name: str


@dataclass(frozen=True)
class CocoAnnotation:
    """An entry of ``annotations``.

    Attributes:
        id: As the file has it; its position there where the file has none.
        image_id, category_id: Of its image and category.
        bbox: X, Y, width, height in pixels of the image, finite, as the file has them.
        iscrowd: Whether it marks a group, which is no prompt.
        segmentation: As the file has it: polygons or RLE, not checked yet; None where there is none.
        rle: The checked mask; None until :func:`carsam.data.coco.checks.check_images` made it.
    """

    id: Id
    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]
    iscrowd: bool = False
    segmentation: Any = field(default=None, repr=False)
    rle: Rle | None = field(default=None, repr=False)

    @property
    def has_mask(self) -> bool:
        """Whether there is a mask, checked or not."""
        return self.rle is not None or self.segmentation is not None

    @property
    def area(self) -> float:
        """Pixels of the mask; what the file calls ``area`` is never used.

        Raises:
            ValueError: The mask was not checked yet.
        """
        if self.rle is None:
            raise ValueError(f"the mask of annotation {self.id} was not made yet; see check_images.")
        return float(mask_utils.area(self.rle))


def read_id(value: Any, what: str, where: str) -> Id:
    """A number or a text that identifies something; whole floats become numbers.

    Args:
        value: From the file.
        what: Name of the field.
        where: The entry, for messages.

    Raises:
        DataError: It is neither.
    """
    if type(value) is int and -MAX_ID < value < MAX_ID:
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < MAX_ID:
        return int(value)
    if isinstance(value, str) and value and is_text(value):
        return value
    raise DataError(f"{where} has the {what} {shown(value)}; a whole number is needed.")


def read_bbox(value: Any, where: str) -> tuple[float, float, float, float]:
    """Four finite numbers.

    Raises:
        DataError: They are not, or lie beyond any image.
    """
    if isinstance(value, list) and len(value) == 4 and all(map(is_coordinate, value)):
        return (float(value[0]), float(value[1]), float(value[2]), float(value[3]))
    raise DataError(f"{where} has the bbox {shown(value)}; four finite numbers x, y, width, height are needed.")


def is_coordinate(value: Any) -> bool:
    """Whether a value is a number that can lie in an image; NaN, infinity and booleans are none."""
    return type(value) in (int, float) and -MAX_COORDINATE <= value <= MAX_COORDINATE


def read_crowd(value: Any, where: str) -> bool:
    """``iscrowd``: 0, 1, and what tools write for them.

    Raises:
        DataError: It is something else.
    """
    key = value.strip().lower() if isinstance(value, str) else value
    if isinstance(key, (str, int, float, type(None))) and key in _CROWD:
        return _CROWD[key]
    raise DataError(f"{where} has the iscrowd {shown(value)}; 0 (one object) or 1 (a group) is needed.")


def read_annotation(entry: Any, index: int, path: Path) -> CocoAnnotation:
    """Checks an entry of ``annotations``; its mask is left for later.

    Raises:
        DataError: A field is missing or not valid.
    """
    if not isinstance(entry, dict):
        raise DataError(f"annotation {index} in {path} is {shown(entry)}, not an object with its fields.")
    where = f"annotation {index} (id {shown(entry.get('id'))}) in {path}"
    missing = [key for key in ("image_id", "category_id", "bbox") if key not in entry]
    if missing:
        raise DataError(f"{where} has no {', '.join(map(repr, missing))}; add it, or leave the annotation out.")
    own_id = entry.get("id")
    return CocoAnnotation(
        id=index if own_id is None else read_id(own_id, "id", where),
        image_id=read_id(entry["image_id"], "image_id", where),
        category_id=read_id(entry["category_id"], "category_id", where),
        bbox=read_bbox(entry["bbox"], where),
        iscrowd=read_crowd(entry.get("iscrowd"), where),
        segmentation=None if _is_empty(entry.get("segmentation")) else entry["segmentation"],
    )


def _is_empty(segmentation: Any) -> bool:
    if isinstance(segmentation, dict) and "counts" in segmentation:
        segmentation = segmentation["counts"]
    if isinstance(segmentation, list):
        return all(item is None or item == [] for item in segmentation)
    return segmentation is None or segmentation == "" or segmentation == {}


def read_image_entry(entry: Any, index: int, path: Path) -> CocoImage:
    """Checks an entry of ``images``.

    Raises:
        DataError: A field is missing or not valid; height and width may be missing, both or one.
    """
    if not isinstance(entry, dict):
        raise DataError(f"image {index} in {path} is {shown(entry)}, not an object with its fields.")
    where = f"image {index} (id {shown(entry.get('id'))}) in {path}"
    missing = [key for key in ("id", "file_name") if key not in entry]
    if missing:
        raise DataError(f"{where} has no {', '.join(map(repr, missing))}; an image needs both.")
    name = entry["file_name"]
    if not isinstance(name, str) or not name.strip() or "\0" in name or not is_text(name):
        raise DataError(f"{where} has the file_name {shown(name)}; the name of an image file is needed.")
    height, width = (_side(entry.get(key), key, where) for key in ("height", "width"))
    if height is None or width is None:
        height = width = None
    elif height * width > MAX_PIXELS:
        raise DataError(
            f"{where} has {width} × {height} pixels; carsam reads images of up to {MAX_PIXELS // 10**6} megapixels."
        )
    return CocoImage(read_id(entry["id"], "id", where), name, height, width)


def _side(value: Any, key: str, where: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 < value < MAX_ID:
        raise DataError(
            f"{where} has the {key} {shown(value)}, which is no positive whole number of pixels; "
            "correct it, or leave height and width out, then the image file tells."
        )
    return value


def read_categories(data: Any, path: Path) -> tuple[CocoCategory, ...]:
    """Checks ``categories``, which may be missing or null.

    Raises:
        DataError: It is no list of objects with an id, or an id has two names.
    """
    if data is None:
        return ()
    if not isinstance(data, list):
        raise DataError(f"'categories' in {path} must be a list of {{id, name}}, not {shown(data)}.")
    found: dict[Id, CocoCategory] = {}
    for i, entry in enumerate(data):
        where = f"category {i} in {path}"
        if not isinstance(entry, dict) or "id" not in entry:
            raise DataError(f"{where} is {shown(entry)}; an object with id and name is needed.")
        own_id = read_id(entry["id"], "id", where)
        name = entry.get("name")
        category = CocoCategory(own_id, name if isinstance(name, str) and is_text(name) else str(own_id))
        before = found.setdefault(own_id, category)
        if before.name != category.name:
            raise DataError(
                f"{where} has the id {own_id!r} of an earlier category, with another name "
                f"({before.name!r}, {category.name!r}); give every category its own id."
            )
    return tuple(found.values())


def one_type(ids: Iterable[Id], what: str, path: Path) -> None:
    """Refuses ids of which some are numbers and others text: they could never match.

    Raises:
        DataError: Names one of each.
    """
    first: dict[type, Id] = {}
    for each in ids:
        first.setdefault(type(each), each)
        if len(first) == 2:
            raise DataError(
                f"{path} has {what} of two types, such as {first[int]} (a number) and {first[str]!r} (text), which "
                "never match; write all of them as numbers."
            )


def counterpart(value: Id) -> Id | None:
    """The same id as the other type: 885 for ``"885"`` and the reverse; None where there is none."""
    if isinstance(value, int):
        return str(value)
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() and abs(number) < MAX_ID else None


def is_text(value: str) -> bool:
    """Whether a text can be written; half of a surrogate pair cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value) if not value.isascii() else True


def shown(value: Any, length: int = 60) -> str:
    """A value for a message, shortened."""
    if isinstance(value, (list, dict)) and len(value) > 8:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)} values"
    if isinstance(value, int) and abs(value) >= 10**length:
        return "a number of far too many digits"
    try:
        text = ascii(value) if isinstance(value, str) and not is_text(value) else repr(value)
    except (RecursionError, ValueError):
        return "a deeply nested or oversized value"
    return text if len(text) <= length else text[: length - 1] + "…"
