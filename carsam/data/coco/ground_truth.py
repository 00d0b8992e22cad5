"""What an evaluation measures on, read and checked before the first prediction: images and their objects.

The ids of a file may be numbers or text. From here on, images and categories are positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_utils

from carsam.data.coco.annotations import CocoAnnotation, CocoImage, Id, Rle
from carsam.data.coco.checks import check_images
from carsam.data.coco.instances import CocoInstances
from carsam.errors import DataError


@dataclass(frozen=True, slots=True)
class TrueObject:
    """An object of the ground truth.

    Attributes:
        image, category: Positions, from 0. They need not be the ids of a file.
        mask: Compressed RLE.
        box: XYWH in pixels.
        area: Of the mask, in pixels.
        crowd: Whether it is a group, which is neither found nor missed.
    """

    image: int
    category: int
    mask: Rle
    box: tuple[float, float, float, float]
    area: float
    crowd: bool = False


@dataclass(frozen=True)
class GroundTruth:
    """Images with their objects.

    Attributes:
        instances: The file.
        folder: Folder that the file names are relative to.
        images: Those to evaluate, in the order of the file.
        objects: Of each image, in the order of the file, crowds included.
        categories: Position of each category id.
        listed: Image ids of the whole file, also of images that are not evaluated.
    """

    instances: CocoInstances
    folder: Path
    images: tuple[CocoImage, ...]
    objects: tuple[tuple[TrueObject, ...], ...]
    categories: dict[Id, int]
    listed: frozenset[Id]

    @classmethod
    def from_file(cls, coco_file: str | Path, folder: str | Path, limit: int | None = None) -> GroundTruth:
        """Reads an instances file with all masks that will be needed, and checks that its images are there.

        Args:
            coco_file: COCO instances.
            folder: Folder that the file names are relative to.
            limit: Only the file's first images.

        Raises:
            DataError: A file is missing or not valid, images are missing, or no image has an object.
        """
        instances = CocoInstances.from_file(coco_file)
        listed = frozenset(image.id for image in instances.images)
        instances = images_to_evaluate(instances, folder, limit)
        images = instances.images
        categories = {category.id: i for i, category in enumerate(instances.categories)}
        objects = tuple(
            tuple(_object(i, categories[a.category_id], a, instances.rle(a, image)) for a in annotations)
            for i, image in enumerate(images)
            for annotations in [instances.annotations[image.id]]
        )
        truth = cls(instances, Path(folder), images, objects, categories, listed)
        if not truth.n_objects:
            raise DataError(f"{coco_file} has no objects (other than crowds) in its {len(images)} images to evaluate.")
        return truth

    @property
    def n_objects(self) -> int:
        """Objects that are no crowds."""
        return sum(len(self.singles(i)) for i in range(len(self.images)))

    def singles(self, index: int) -> tuple[TrueObject, ...]:
        """An image's objects without crowds."""
        return tuple(item for item in self.objects[index] if not item.crowd)

    def read_image(self, index: int) -> np.ndarray:
        """An image as ``(H, W, 3)`` uint8 RGB.

        Raises:
            DataError: It cannot be read, or has another size than the file says.
        """
        return self.instances.read_image(self.images[index], self.folder)

    def image_path(self, index: int) -> Path:
        """Where an image lies."""
        return self.images[index].path or self.folder / self.images[index].file_name


def images_to_evaluate(instances: CocoInstances, folder: str | Path, limit: int | None) -> CocoInstances:
    """The part of a file to evaluate, checked. All images must exist: scores over what is there mean nothing.

    Raises:
        DataError: The folder or images in it are missing or not valid, or no image is left.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} images leaves nothing to evaluate; give at least 1.")
    if not instances.images:
        raise DataError(f"{instances.path} lists no images.")
    return check_images(instances, instances.images[:limit], folder)


def _object(image: int, category: int, annotation: CocoAnnotation, mask: Rle) -> TrueObject:
    return TrueObject(image, category, mask, annotation.bbox, float(mask_utils.area(mask)), annotation.iscrowd)
