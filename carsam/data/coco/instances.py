"""A COCO instances file, checked when read: its images, their annotations, categories, boxes and masks."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_utils

from carsam.data.boxes import xywh_to_xyxy
from carsam.data.coco.annotations import (
    CocoAnnotation,
    CocoCategory,
    CocoImage,
    Id,
    Rle,
    counterpart,
    one_type,
    read_annotation,
    read_categories,
    read_image_entry,
)
from carsam.data.coco.json_file import read_json
from carsam.data.coco.masks import to_rle
from carsam.data.images.reading import read_image
from carsam.data.notes import Notes
from carsam.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CocoInstances:
    """An instances file.

    Attributes:
        path: Where it was read.
        images: In the order of the file.
        annotations: By image id, in the order of the file; every image has an entry. Annotations of images that the
            file does not list are left out, as pycocotools does.
        categories: Those that only annotations mention are added.
    """

    path: Path
    images: tuple[CocoImage, ...]
    annotations: dict[Id, tuple[CocoAnnotation, ...]]
    categories: tuple[CocoCategory, ...]
    _by_id: dict[Id, CocoImage] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Indexes the images."""
        object.__setattr__(self, "_by_id", {image.id: image for image in self.images})

    @classmethod
    def from_file(cls, path: str | Path) -> CocoInstances:
        """Reads and checks an instances file; masks are checked where they are needed.

        Raises:
            DataError: The file is missing, is not JSON, lacks what an instances file has, or an entry is not valid.
        """
        path = Path(path)
        data = read_json(path)
        if isinstance(data, list):
            raise DataError(
                f"{path} is a list, as detection results are; give the annotation file (images, annotations)."
            )
        missing = [key for key in ("images", "annotations") if not isinstance(data, dict) or key not in data]
        if missing:
            raise DataError(f"{path} has no {' and no '.join(map(repr, missing))}; a COCO instances file is needed.")
        for key in ("images", "annotations"):
            if not isinstance(data[key], list):
                raise DataError(f"{key!r} in {path} must be a list.")

        images = tuple(read_image_entry(entry, i, path) for i, entry in enumerate(data["images"]))
        one_type((image.id for image in images), "image ids", path)
        by_image = _by_image(images, data["annotations"], path)
        categories = _with_used(read_categories(data.get("categories"), path), by_image, path)
        return cls(path, images, {key: tuple(group) for key, group in by_image.items()}, categories)

    def image(self, image_id: Id) -> CocoImage:
        """An image by its id.

        Raises:
            DataError: The file has no such image.
        """
        if image_id not in self._by_id:
            raise DataError(f"{self.path} has no image with id {image_id}.")
        return self._by_id[image_id]

    def instances(self, image_id: Id) -> tuple[CocoAnnotation, ...]:
        """Annotations of single objects: those that are not crowds."""
        return tuple(a for a in self.annotations[image_id] if not a.iscrowd)

    def boxes(self, image_id: Id) -> np.ndarray:
        """Boxes of :meth:`instances`, ``(N, 4)`` XYXY float64 in pixels of the image, as the file has them."""
        return xywh_to_xyxy([a.bbox for a in self.instances(image_id)])

    def masks(self, image_id: Id) -> np.ndarray:
        """Masks of :meth:`instances`, ``(N, H, W)`` bool.

        Raises:
            DataError: An annotation has no usable segmentation.
        """
        image = self.image(image_id)
        rles = [self.rle(a, image) for a in self.instances(image_id)]
        if not rles:
            return np.zeros((0, *image.size), dtype=bool)
        return mask_utils.decode(rles).transpose(2, 0, 1).astype(bool)

    def rle(self, annotation: CocoAnnotation, image: CocoImage) -> Rle:
        """An annotation's segmentation (polygons, plain or compressed RLE) as compressed RLE.

        Raises:
            DataError: There is none, or it does not fit the image.
        """
        rle = self.rle_or_none(annotation, image)
        if rle is None:
            raise DataError(f"{self.where(annotation, image)} has no segmentation; masks need polygons or RLE.")
        return rle

    def rle_or_none(self, annotation: CocoAnnotation, image: CocoImage) -> Rle | None:
        """As :meth:`rle`, but None for an annotation without a mask.

        Raises:
            DataError: The segmentation is not valid or does not fit the image.
        """
        if annotation.rle is not None:
            return annotation.rle
        try:
            return to_rle(annotation.segmentation, image.size)
        except DataError:
            raise
        except ValueError as error:
            raise DataError(
                f"{self.where(annotation, image)} has a segmentation that cannot be read: {error}."
            ) from error

    def where(self, annotation: CocoAnnotation, image: CocoImage) -> str:
        """Names an annotation in a message."""
        return f"annotation {annotation.id} of image {image.file_name!r} in {self.path}"

    def read_image(self, image: CocoImage, folder: str | Path) -> np.ndarray:
        """Reads an image in the orientation that the annotations use: ``(H, W, 3)`` uint8 RGB.

        Raises:
            DataError: The file is missing or unreadable, or has another size than the annotations say.
        """
        path = Path(folder) / image.file_name if image.path is None else image.path
        notes = None if image.path is None else Notes()  # check_images has said what is to be said
        upright = image.upright is not False
        pixels = read_image(path, apply_exif=upright, notes=notes)
        if image.height is not None and pixels.shape[:2] != image.size:
            # Some annotation tools ignore the EXIF orientation; the noted size tells.
            pixels = read_image(path, apply_exif=not upright, notes=notes)
        if image.height is not None and pixels.shape[:2] != image.size:
            raise DataError(
                f"{path} is {pixels.shape[0]} × {pixels.shape[1]} pixels (height × width), but {self.path.name} says "
                f"{image.height} × {image.width}; use the images that were annotated."
            )
        return pixels


def _by_image(images: tuple[CocoImage, ...], entries: list[object], path: Path) -> dict[Id, list[CocoAnnotation]]:
    by_image: dict[Id, list[CocoAnnotation]] = {}
    names: dict[Id, str] = {}
    for image in images:
        if image.id in by_image:
            raise DataError(
                f"{path} lists the image id {image.id!r} twice ({names[image.id]!r}, {image.file_name!r}); "
                "image ids must be unique."
            )
        by_image[image.id], names[image.id] = [], image.file_name

    ids: set[Id] = set()
    foreign = []
    for i, entry in enumerate(entries):
        annotation = read_annotation(entry, i, path)
        ids.add(annotation.id)
        if annotation.image_id in by_image:
            by_image[annotation.image_id].append(annotation)
            continue
        if counterpart(annotation.image_id) in by_image:
            raise DataError(
                f"annotation {i} (id {annotation.id}) in {path} has the image_id {annotation.image_id!r}, but the "
                f"image has the id {counterpart(annotation.image_id)!r}: a number and a text never match; "
                "write both as numbers."
            )
        foreign.append(annotation)
    if foreign:
        logger.warning(
            "%d of %d annotations in %s are of images that it does not list, and are left out (first: annotation %s, "
            "image_id %r).",
            *(len(foreign), len(entries), path, foreign[0].id, foreign[0].image_id),
        )
    if len(ids) < len(entries):
        logger.warning(
            "%d annotation ids in %s occur more than once; each entry counts as an object of its own.",
            *(len(entries) - len(ids), path),
        )
    return by_image


def _with_used(
    listed: tuple[CocoCategory, ...], by_image: dict[Id, list[CocoAnnotation]], path: Path
) -> tuple[CocoCategory, ...]:
    """The categories, with those that only annotations mention."""
    categories = {category.id: category for category in listed}
    for annotation in (a for group in by_image.values() for a in group):
        used = annotation.category_id
        if used in categories:
            continue
        if counterpart(used) in categories:
            raise DataError(
                f"annotation {annotation.id} in {path} has the category_id {used!r}, but the category has the id "
                f"{counterpart(used)!r}: a number and a text never match; write both as numbers."
            )
        categories[used] = CocoCategory(used, str(used))
    one_type(categories, "category ids", path)
    return tuple(categories.values())
