"""Checks of images, annotations and detections against each other, before the first image is predicted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from carsam.data.boxes import clip_boxes, xywh_to_xyxy
from carsam.data.coco.annotations import CocoAnnotation, CocoImage, Id, counterpart
from carsam.data.coco.box_form import BoxSample, check_boxes
from carsam.data.coco.detections import Detection
from carsam.data.coco.instances import CocoInstances
from carsam.data.coco.masks import tight_box
from carsam.data.images.file import Header, check_whole, read_header
from carsam.data.images.folder import ImageFolder, locate
from carsam.data.notes import Notes
from carsam.errors import DataError

# So many images are decoded once to see whether they are whole; of more, only the ends of the files are looked at.
MAX_DECODED = 200
# Boxes of a calibration that are compared with masks.
MAX_COMPARED = 500

AMBIGUOUS = (
    "have an EXIF orientation that leaves the size as it is, so nothing tells whether the annotations follow it; they "
    "are taken as drawn upright, as viewers show the image. If they were drawn on the stored pixels, remove the tag "
    "(exiftool -Orientation= FILE)"
)
SWAPPED = "have boxes that fit only with width and height swapped, and are read that way"
WIDE = "hold 16 bits a channel; each is scaled by the bits that it uses (8, 10, 12, 14 or 16)"

logger = logging.getLogger(__name__)


def check_images(instances: CocoInstances, images: Sequence[CocoImage], folder: str | Path) -> CocoInstances:
    """Checks everything about images and their annotations that can be known before a prediction.

    Image files are found, also under another spelling of their name; their headers give sizes that the file lacks, and
    tell which orientation the annotations follow; cut-off files are found; masks are checked and made; boxes are
    compared with them. What can be left out (annotations without a mask) is counted in one logged warning.

    Args:
        instances: The annotation file.
        images: Those of its images that will be used.
        folder: Folder that the file names are relative to.

    Returns:
        The same file with only ``images``, whose sizes and paths are known, and with only annotations that have a mask.

    Raises:
        DataError: Folder or images are missing, unreadable, or of another size than noted; a mask is not valid; boxes
            are of another form; or no object has a mask.
    """
    found, respelled = locate(images, ImageFolder(folder), instances.path)
    log_respelled(respelled, found, len(images))
    notes = Notes()
    checked = _each(images, lambda image: _with_header(instances, image, found[image.id], notes), instances.path)
    decode = len(images) <= MAX_DECODED
    _each(checked, lambda image: check_whole(image.path, decode=decode), instances.path)
    notes.log(logger, len(images))
    annotations = _with_masks(instances, checked)
    ready = CocoInstances(instances.path, tuple(checked), annotations, instances.categories)
    check_boxes([_sample(ready, i, a) for i in checked for a in ready.instances(i.id)], str(instances.path))
    return ready


def log_respelled(images: Sequence[CocoImage], paths: dict[Id, Path], total: int) -> None:
    """Logs one warning about images that were found under another spelling of their name."""
    if images:
        logger.warning(
            "%d of %d images were found under another spelling of their name (first: %r is %s).",
            *(len(images), total, images[0].file_name, paths[images[0].id]),
        )


def _each(images: Iterable[CocoImage], check: Callable[[CocoImage], Any], source: Path) -> list[Any]:
    """Results of a check over all images; all failures are reported together."""
    results, errors = [], []
    for image in images:
        try:
            results.append(check(image))
        except DataError as error:
            errors.append(str(error))
    if len(errors) == 1:
        raise DataError(errors[0])
    if errors:
        raise DataError(f"{len(errors)} images of {source} cannot be used; the first: {errors[0]}")
    return results


def _with_header(instances: CocoInstances, image: CocoImage, path: Path, notes: Notes) -> CocoImage:
    header = read_header(path)
    if header.wide:
        notes.add(WIDE, image.file_name)
    return oriented(image, path, header, instances.annotations[image.id], notes)


def oriented(
    image: CocoImage, path: Path, header: Header, annotations: Sequence[CocoAnnotation], notes: Notes
) -> CocoImage:
    """An image with its file, and with the size and orientation that its annotations were drawn in.

    Args:
        image: As the annotation file has it.
        path: The image file.
        header: What that says.
        annotations: Of the image; their boxes and RLE sizes tell where the noted size does not.
        notes: Receives what was assumed.

    Raises:
        DataError: The image has another size than noted.
    """
    stored, upright = header.size, header.upright_size
    mask_size = _mask_size(annotations)
    noted = None if image.height is None else image.size
    size = noted or (mask_size if mask_size in (stored, upright) else upright)
    other = size[::-1]
    if noted is not None and other != noted and (other in (stored, upright)) and mask_size in (other, None):
        boxes = xywh_to_xyxy([a.bbox for a in annotations])
        if mask_size == other or (_reach_beyond(boxes, noted) and not _reach_beyond(boxes, other)):
            notes.add(SWAPPED, image.file_name)
            size = other
    if size not in (stored, upright):
        raise DataError(
            f"{path} is {upright[0]} × {upright[1]} pixels (height × width), but the annotation file says "
            f"{size[0]} × {size[1]}; use the images that were annotated."
        )
    if header.orientation != 1 and stored == upright:
        notes.add(AMBIGUOUS, image.file_name)
    return replace(image, height=size[0], width=size[1], path=path, upright=size == upright)


def _mask_size(annotations: Sequence[CocoAnnotation]) -> tuple[int, int] | None:
    """The size that the RLE masks of an image have; None where there are none, or they differ."""
    sizes = set()
    for annotation in annotations:
        size = annotation.segmentation.get("size") if isinstance(annotation.segmentation, dict) else None
        if isinstance(size, list) and len(size) == 2 and all(isinstance(side, (int, float)) for side in size):
            sizes.add(tuple(size))
    return sizes.pop() if len(sizes) == 1 else None


def _reach_beyond(boxes: np.ndarray, size: tuple[int, int]) -> bool:
    height, width = size
    return bool((boxes[:, 2:] > np.array([width, height]) * 1.01 + 2).any())


def _with_masks(instances: CocoInstances, images: Sequence[CocoImage]) -> dict[Id, tuple[CocoAnnotation, ...]]:
    """Annotations with their masks made; those without are left out and counted."""
    kept: dict[Id, tuple[CocoAnnotation, ...]] = {}
    left_out: list[CocoAnnotation] = []
    objects = 0
    for image in images:
        made = []
        for annotation in instances.annotations[image.id]:
            rle = instances.rle_or_none(annotation, image)
            if rle is None:
                left_out.append(annotation)
            else:
                made.append(replace(annotation, segmentation=None, rle=rle))
                objects += not annotation.iscrowd
        kept[image.id] = tuple(made)
    if not left_out:
        return kept
    crowds = sum(annotation.iscrowd for annotation in left_out)
    lost = len(left_out) - crowds
    if lost and not objects:
        raise DataError(
            f"none of the {lost} objects in {instances.path} has a mask (segmentation), which an evaluation needs; "
            "boxes alone can serve as prompts of a calibration."
        )
    parts = [f"{lost} of {lost + objects} objects"] if lost else []
    parts += [f"{crowds} groups (iscrowd)"] if crowds else []
    logger.warning(
        "left out, because they have no mask: %s in %s (first: annotation %s).",
        *(" and ".join(parts), instances.path, left_out[0].id),
    )
    return kept


def check_calibration_boxes(instances: CocoInstances) -> None:
    """Compares boxes that will be prompts with their masks, where they have some; of many, with evenly chosen ones.

    Raises:
        DataError: Most of them are of another form than COCO's.
    """
    pairs = [(image, a) for image in instances.images if image.height for a in instances.instances(image.id)]
    check_boxes([_sample(instances, *pair) for pair in pairs[:: 1 + len(pairs) // MAX_COMPARED]], str(instances.path))


def _sample(instances: CocoInstances, image: CocoImage, annotation: CocoAnnotation) -> BoxSample:
    try:
        rle = instances.rle_or_none(annotation, image)
    except DataError:
        rle = None  # a calibration needs no mask
    box = tight_box(rle) if rle is not None else None
    return BoxSample(f"annotation {annotation.id}", annotation.bbox, image.size, box)


def check_detections(detections: Sequence[Detection], instances: CocoInstances, path: str | Path) -> None:
    """Checks that the ids of detections can match, and that their boxes have COCO's form.

    Args:
        detections: Results of a detector.
        instances: The annotations, checked; detections of other images are not looked at.
        path: The detections' file, for messages.

    Raises:
        DataError: An id is a number in one file and text in the other, or most boxes are of another form.
    """
    images = {image.id: image for image in instances.images}
    categories = {category.id for category in instances.categories}
    samples = []
    for i, d in enumerate(detections):
        for what, value, known in (("image_id", d.image_id, images), ("category_id", d.category_id, categories)):
            if value not in known and counterpart(value) in known:
                raise DataError(
                    f"detection {i} in {path} has the {what} {value!r}, but {instances.path} has "
                    f"{counterpart(value)!r}: a number and a text never match; write both as numbers."
                )
        image = images.get(d.image_id)
        # Boxes wholly outside are dropped and counted later.
        if image is not None and clip_boxes(xywh_to_xyxy([d.bbox]), image.size)[1].all():
            samples.append(BoxSample(f"detection {i}", d.bbox, image.size))
    check_boxes(samples[:: 1 + len(samples) // MAX_COMPARED], str(path))
