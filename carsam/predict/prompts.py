"""Prompts from the command line and from files, checked against the images that they belong to."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from carsam.data.boxes import clip_boxes
from carsam.data.coco.annotations import CocoAnnotation, CocoImage, Id
from carsam.data.coco.box_form import BoxSample, check_boxes
from carsam.data.coco.checks import oriented
from carsam.data.coco.instances import CocoInstances
from carsam.data.coco.json_file import read_text
from carsam.data.coco.masks import tight_box
from carsam.data.images.folder import name_parts
from carsam.data.notes import Notes
from carsam.errors import DataError
from carsam.predict.inputs import Photo, shown

logger = logging.getLogger(__name__)

Point = tuple[float, float, int]
_ONE_OBJECT = "points belong to one object, so only one box can go with them"


@dataclass(frozen=True)
class Prompt:
    """What shows one object.

    Attributes:
        box: XYXY in pixels of the image, or None.
        points: (x, y, label) in pixels of the image; label 1 inside the object, 0 outside.
        category: Id and name of COCO, where the prompts come from there.
        annotation: Id of the COCO annotation.
    """

    box: tuple[float, ...] | None = None
    points: tuple[Point, ...] = ()
    category: tuple[Id, str] | None = None
    annotation: Id | None = None


def from_flags(boxes: Sequence[str], points: Sequence[str]) -> list[Prompt]:
    """Prompts of ``--box`` and ``--point``, not yet checked against an image.

    Raises:
        DataError: One cannot be read, or points come with several boxes.
    """
    read_boxes = [tuple(_numbers(text, "--box", (4,), "x1,y1,x2,y2")) for text in boxes]
    read_points = []
    for text in points:
        x, y, label = [*_numbers(text, "--point", (2, 3), "x,y or x,y,label"), 1.0][:3]
        if label not in (0, 1):
            raise DataError(f"the point {text} has the label {label:g}; write 1 for inside the object, 0 for outside.")
        read_points.append((x, y, int(label)))
    if read_points and len(read_boxes) > 1:
        raise DataError(f"{_ONE_OBJECT}; give one --box, or list the objects in a file for --prompts.")
    return [Prompt(box, tuple(read_points)) for box in read_boxes or ([None] if read_points else [])]


def _numbers(text: str, flag: str, counts: tuple[int, ...], form: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts or not all(map(math.isfinite, numbers)):
        raise DataError(f"cannot read {flag} {text!r}; write it as {form}.")
    return numbers


def check(prompts: Iterable[Prompt], photo: Photo, source: str = "") -> list[Prompt]:
    """The prompts with boxes clipped to the image.

    Args:
        prompts: Of one image.
        photo: The image, with its size.
        source: Where they come from, for messages.

    Raises:
        DataError: A box has no area in the image, a point lies outside, or the numbers are shares of the image's size
            (0..1) instead of pixels.
    """
    return [_checked(prompt, photo, f" ({source})" if source else "") for prompt in prompts]


def _checked(prompt: Prompt, photo: Photo, source: str) -> Prompt:
    height, width = photo.size
    image = f"{shown(photo.path)}, which is {width} × {height} pixels (width × height)"
    for x, y, _ in prompt.points:
        if not (0 <= x <= width and 0 <= y <= height):
            raise DataError(f"the point {x:g},{y:g}{source} lies outside the image {image}.")
        if max(x, y) <= 1 and not (float(x).is_integer() and float(y).is_integer()) and min(photo.size) > 2:
            pixels = f"{x * width:.0f},{y * height:.0f}"
            raise DataError(
                f"the point {x:g},{y:g}{source} is on 0..1, but prompts are in pixels: of {image}, that is {pixels}."
            )
    if prompt.box is None:
        return prompt
    text = ",".join(f"{value:g}" for value in prompt.box)
    if max(prompt.box) <= 1 and min(prompt.box) >= 0 and min(photo.size) > 2:
        pixels = ",".join(f"{value * side:.0f}" for value, side in zip(prompt.box, (width, height) * 2))
        raise DataError(f"the box {text}{source} is on 0..1, but prompts are in pixels: of {image}, that is {pixels}.")
    clipped, valid = clip_boxes(prompt.box, photo.size)
    if not valid[0]:
        raise DataError(
            f"the box {text}{source} has no area inside the image {image}; a box is x1,y1,x2,y2 with x1 < x2 and "
            "y1 < y2."
        )
    return replace(prompt, box=tuple(clipped[0].tolist()))


@dataclass(frozen=True)
class Assignment:
    """Photos with the prompts of a file.

    Attributes:
        work: The photos with their prompts.
        without: Photos that the file says nothing of.
        absent: Images of the file that are not among the photos.
        image_ids: COCO ids by path; None where the file has none.
    """

    work: list[tuple[Photo, list[Prompt]]]
    without: int = 0
    absent: int = 0
    image_ids: dict[Path, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FilePrompts:
    """Prompts of a file, by the image name that it says.

    Attributes:
        path: The file.
        by_name: The prompts of every image.
        coco: The COCO file, if it is one.
        images: Its images by name.
    """

    path: Path
    by_name: dict[str, list[Prompt]]
    coco: CocoInstances | None = None
    images: dict[str, CocoImage] = field(default_factory=dict)
    notes: Notes = field(default_factory=Notes)

    def assign(self, photos: Sequence[Photo]) -> Assignment:
        """Checked prompts of every photo that the file names.

        Raises:
            DataError: No photo is named, a name fits several, or a prompt does not fit its image.
        """
        found: dict[int, str] = {}
        by_base: dict[str, list[int]] = {}
        for index, photo in enumerate(photos):
            by_base.setdefault(name_parts(str(photo.path))[-1], []).append(index)
        absent = 0
        for name in self.by_name:
            fits = self._fitting(name, photos, by_base)
            if len(fits) > 1:
                places = " and ".join(shown(photos[i].path) for i in fits[:2])
                raise DataError(f"{name!r} in {self.path} could be {places}; give them one folder at a time.")
            if not fits:
                absent += 1
            elif fits[0] in found:
                raise DataError(
                    f"{self.path} names {shown(photos[fits[0]].path)} twice, as {found[fits[0]]!r} and {name!r}."
                )
            else:
                found[fits[0]] = name
        if not found:
            names = ", ".join(repr(name) for name in list(self.by_name)[:3])
            raise DataError(
                f"{self.path} has no prompts for the images given; it names {names or 'none'}, the first image is "
                f"{shown(photos[0].path.name)!r}."
                if photos
                else f"{self.path} has no prompts for the images given."
            )
        work, ids = [], {}
        chosen = {index: self._turned(photos[index], name) for index, name in sorted(found.items())}
        self._check_form([(photo, found[index]) for index, photo in chosen.items()])
        for index, photo in chosen.items():
            name = found[index]
            if self.by_name[name]:
                work.append((photo, check(self.by_name[name], photo, str(self.path))))
                ids[photo.path] = self.images[name].id if name in self.images else None
        if not work:
            raise DataError(f"{self.path} has no boxes and no points for the images given.")
        return Assignment(work, len(photos) - len(work), absent, ids)

    def _fitting(self, name: str, photos: Sequence[Photo], by_base: dict[str, list[int]]) -> list[int]:
        """The photos that a name can mean: those in folders of the same names, else those of the file's name."""
        parts = name_parts(name)
        candidates = by_base.get(parts[-1], []) if parts else []
        fits = [i for i in candidates if name_parts(str(photos[i].path))[-len(parts) :] == parts] or candidates
        # Spelled alike but for case or composition: the exact one counts.
        exact = [i for i in fits if photos[i].path.name == name.replace("\\", "/").rpartition("/")[2]]
        return exact if len(fits) > 1 and len(exact) == 1 else fits

    def _turned(self, photo: Photo, name: str) -> Photo:
        """The photo in the size and orientation in which its COCO annotations were drawn."""
        if self.coco is None or name not in self.images:
            return photo
        entry = self.images[name]
        image = oriented(entry, photo.path, photo.header, self.coco.annotations[entry.id], self.notes)
        return replace(photo, size=image.size, upright=bool(image.upright))

    def _check_form(self, chosen: Sequence[tuple[Photo, str]]) -> None:
        """Refuses COCO boxes of another form, such as x1, y1, x2, y2, where masks or image borders tell."""
        if self.coco is None:
            return
        self.notes.log(logger, len(chosen))
        samples = []
        for photo, name in chosen:
            image = replace(self.images[name], height=photo.size[0], width=photo.size[1])
            for a in self.coco.instances(image.id):
                samples.append(BoxSample(f"annotation {a.id}", a.bbox, photo.size, _mask_box(self.coco, a, image)))
        check_boxes(samples, str(self.path))


def read_prompts(path: Path) -> FilePrompts:
    """Reads a file of prompts: COCO instances (the boxes of each image), or JSON lines.

    A line is ``{"image": "a.jpg", "boxes": [[x1, y1, x2, y2], ...], "points": [[x, y], ...], "labels": [1, ...]}``.
    Points belong to one object, with a box to that box's; points nested once more (a list for each object) belong to
    several. Without labels all points are inside.

    Raises:
        DataError: The file cannot be read, or an entry is wrong; the message names it.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and "image" not in content:
        return _from_coco(path)
    prompts = FilePrompts(path, {})
    for where, entry in _entries(text, content, path):
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise DataError(f'{where} has no "image": a name is needed, such as {{"image": "a.jpg", "boxes": ...}}.')
        found = _objects(entry, where)
        if not found:
            raise DataError(f'{where} has no "boxes" and no "points".')
        prompts.by_name.setdefault(entry["image"], []).extend(found)
    if not prompts.by_name:
        raise DataError(f"{path} holds no prompts.")
    return prompts


def _entries(text: str, content: Any, path: Path) -> Iterable[tuple[str, Any]]:
    if content is not None:
        for index, entry in enumerate(content if isinstance(content, list) else [content]):
            yield f"entry {index + 1} of {path}", entry
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield f"line {number} of {path}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"line {number} of {path} is not valid JSON: {error}.") from error


def _objects(entry: dict[str, Any], where: str) -> list[Prompt]:
    boxes = [tuple(box) for box in _rows(entry.get("boxes"), 4, f'"boxes" in {where}', "[[x1, y1, x2, y2], ...]")]
    groups = entry.get("points") or []
    labels = entry.get("labels")
    nested = (
        isinstance(groups, list)
        and bool(groups)
        and isinstance(groups[0], list)
        and bool(groups[0])
        and isinstance(groups[0][0], list)
    )
    if not nested:
        groups, labels = ([groups], None if labels is None else [labels]) if groups else ([], labels and [labels])
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(groups)):
        raise DataError(f'"labels" in {where} do not fit "points"; give one label (1 or 0) a point, nested alike.')
    points = [_labelled(group, None if labels is None else labels[i], where) for i, group in enumerate(groups)]
    if boxes and points and len(boxes) != len(points):
        raise DataError(
            f"{where} has {len(boxes)} boxes and points of {len(points)} object(s): {_ONE_OBJECT}; nest the points, "
            "one list for each box."
        )
    return [Prompt(boxes[i] if boxes else None, points[i] if points else ()) for i in range(len(boxes or points))]


def _labelled(points: Any, labels: Any, where: str) -> tuple[Point, ...]:
    rows = _rows(points, 2, f'"points" in {where}', "[[x, y], ...]")
    labels = [1] * len(rows) if labels is None else labels
    if not isinstance(labels, list) or len(labels) != len(rows) or any(label not in (0, 1) for label in labels):
        raise DataError(f'"labels" in {where} do not fit "points"; give one label (1 or 0) a point, nested alike.')
    return tuple((x, y, int(label)) for (x, y), label in zip(rows, labels))


def _rows(values: Any, length: int, what: str, form: str) -> list[list[float]]:
    rows = [] if values is None else values
    good = isinstance(rows, list) and all(isinstance(row, list) and len(row) == length for row in rows)
    if not good or not all(_is_number(value) for row in rows for value in row):
        raise DataError(f"{what} cannot be read; write it as {form}, with finite numbers.")
    return [[float(value) for value in row] for row in rows]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def _from_coco(path: Path) -> FilePrompts:
    coco = CocoInstances.from_file(path)
    names = {category.id: category.name for category in coco.categories}
    by_name: dict[str, list[Prompt]] = {}
    images: dict[str, CocoImage] = {}
    for image in coco.images:
        if image.file_name in images:
            raise DataError(f"{path} names the image {image.file_name!r} twice; keep one entry.")
        images[image.file_name] = image
        by_name[image.file_name] = [
            Prompt(tuple(map(float, box)), (), (a.category_id, names[a.category_id]), a.id)
            for box, a in zip(coco.boxes(image.id), coco.instances(image.id))
        ]
    return FilePrompts(path, by_name, coco, images)


def _mask_box(coco: CocoInstances, annotation: CocoAnnotation, image: CocoImage) -> np.ndarray | None:
    """Box of an object's mask, which tells whether its own box is of the right form; None without a usable mask."""
    try:
        rle = coco.rle_or_none(annotation, image)
    except DataError:
        return None  # the masks are not used here
    return None if rle is None else tight_box(rle)
