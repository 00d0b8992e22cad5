"""What an evaluation measures on, read and checked before the first prediction: images, objects, box prompts.

The ids of a file may be numbers or text. From here on, images and categories are positions.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_utils

from carsam.data.checks import check_detections, check_images
from carsam.data.coco import CocoAnnotation, CocoImage, CocoInstances, clip_boxes, load_detections, xywh_to_xyxy
from carsam.errors import DataError
from carsam.evaluate.average_precision import Rle, TrueObject

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A box prompt.

    Attributes:
        box: XYXY in pixels of the image, inside it.
        category: Position of its category.
        score: Of the detection; 1 for ground truth.
        target: Mask of its own object; None for a detection.
    """

    box: tuple[float, float, float, float]
    category: int
    score: float
    target: Rle | None


@dataclass(frozen=True)
class GroundTruth:
    """Images with their objects.

    Attributes:
        instances: The file.
        folder: Folder that the file names are relative to.
        images: Those to evaluate, in the order of the file.
        objects: Of each image, in the order of the file, crowds included.
        categories: Position of each category id.
    """

    instances: CocoInstances
    folder: Path
    images: tuple[CocoImage, ...]
    objects: tuple[tuple[TrueObject, ...], ...]
    categories: dict[int | str, int]

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
        instances = images_to_evaluate(instances, folder, limit)
        images = instances.images
        categories = {category.id: i for i, category in enumerate(instances.categories)}
        objects = tuple(
            tuple(_object(i, categories[a.category_id], a, instances.rle(a, image)) for a in annotations)
            for i, image in enumerate(images)
            for annotations in [instances.annotations[image.id]]
        )
        truth = cls(instances, Path(folder), images, objects, categories)
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


def box_prompts(truth: GroundTruth, detections: str | Path | None = None) -> list[list[Prompt]]:
    """The box prompts of every image, clipped to it.

    Args:
        truth: Images and objects, whose own boxes are the prompts without ``detections``.
        detections: COCO detection results.

    Raises:
        DataError: The file is missing or not valid, is for other images or categories, or no box has an area inside
            its image.
    """
    if detections is None:
        prompts = [
            [Prompt(_xyxy(item.box), item.category, 1.0, item.mask) for item in truth.singles(i)]
            for i in range(len(truth.images))
        ]
    else:
        prompts = _detection_prompts(truth, detections)
    dropped = 0
    for i, image in enumerate(truth.images):
        if prompts[i]:
            boxes, valid = clip_boxes(np.array([p.box for p in prompts[i]]), image.size)
            dropped += int((~valid).sum())
            prompts[i] = [
                Prompt(tuple(box.tolist()), p.category, p.score, p.target)
                for box, p, ok in zip(boxes, prompts[i], valid)
                if ok
            ]
    if not any(prompts):
        source = detections or truth.instances.path
        raise DataError(
            f"no box prompt for the images of {source} has an area inside its image; boxes are x, y, width, height in "
            "pixels."
        )
    if dropped:
        missed = "" if detections else "; their objects count as missed"
        logger.warning("%d boxes without area inside their image dropped%s", dropped, missed)
    return prompts


def _object(image: int, category: int, annotation: CocoAnnotation, mask: Rle) -> TrueObject:
    return TrueObject(image, category, mask, annotation.bbox, float(mask_utils.area(mask)), annotation.iscrowd)


def _xyxy(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    return tuple(xywh_to_xyxy([box])[0].tolist())


def _detection_prompts(truth: GroundTruth, path: str | Path) -> list[list[Prompt]]:
    detections = load_detections(path)
    check_detections(detections, truth.instances, path)
    positions = {image.id: i for i, image in enumerate(truth.images)}
    here = [d for d in detections if d.image_id in positions]
    annotated = truth.instances.path
    if not here:
        raise DataError(
            f"none of the {len(detections)} detections in {path} is for an image to evaluate: image ids are such as "
            f"{detections[0].image_id!r} there and {truth.images[0].id!r} in {annotated}. Give detections of the same "
            "images, with the same ids."
        )
    unknown = [d for d in here if d.category_id not in truth.categories]
    if len(unknown) == len(here):
        raise DataError(
            f"no category of the detections in {path} is in {annotated}: category ids are such as "
            f"{unknown[0].category_id!r} there and {next(iter(truth.categories))!r} in the annotations. Use the "
            "annotations' category ids in the detections (not positions, not names)."
        )
    if unknown:
        names = ", ".join(map(repr, sorted({d.category_id for d in unknown}, key=str)[:5]))
        logger.warning(
            "%d of %d detections left out: their categories (%s) are not in %s",
            len(unknown),
            len(here),
            names,
            annotated,
        )
    prompts: list[list[Prompt]] = [[] for _ in truth.images]
    for d in here:
        if d.category_id in truth.categories:
            prompts[positions[d.image_id]].append(Prompt(_xyxy(d.bbox), truth.categories[d.category_id], d.score, None))
    return prompts
