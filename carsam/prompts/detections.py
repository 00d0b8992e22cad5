"""A detector's boxes, checked against the annotations before they become prompts.

Detections that do not fit (ids of another file, categories by position, boxes of another form) would score near 0
without an error; here they stop the evaluation before it begins.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_utils

from carsam.data.coco.annotations import Id
from carsam.data.coco.checks import check_detections
from carsam.data.coco.detections import Detection, load_detections
from carsam.data.coco.ground_truth import GroundTruth
from carsam.errors import DataError

logger = logging.getLogger(__name__)

# A detection that overlaps an object's box this much is of that object.
FOUND_IOU = 0.7
# Fewer detections than this prove nothing about a whole file.
MIN_FOUND = 5


def matching_detections(truth: GroundTruth, path: str | Path) -> list[list[Detection]]:
    """Reads COCO detection results: of every image its detections with a known category, in the order of the file.

    Args:
        truth: Images and objects.
        path: The detections' file.

    Raises:
        DataError: The file is missing or not valid, or does not fit the annotations.
    """
    detections = load_detections(path)
    check_detections(detections, truth.instances, path)
    here = _of_these_images(truth, detections, path)
    known = _of_known_categories(truth, here, path)
    positions = {image.id: i for i, image in enumerate(truth.images)}
    by_image: list[list[Detection]] = [[] for _ in truth.images]
    for detection in known:
        by_image[positions[detection.image_id]].append(detection)
    _check_overlaps(truth, by_image, path)
    return by_image


def _of_these_images(truth: GroundTruth, detections: Sequence[Detection], path: str | Path) -> list[Detection]:
    annotated = truth.instances.path
    foreign = [d for d in detections if d.image_id not in truth.listed]
    chosen = {image.id for image in truth.images}
    here = [d for d in detections if d.image_id in chosen]
    if not here:
        raise DataError(
            f"none of the {len(detections)} detections in {path} is for an image to evaluate: image ids are such as "
            f"{detections[0].image_id!r} there and {truth.images[0].id!r} in {annotated}. Give detections of the same "
            "images, with the same ids."
        )
    if foreign:
        logger.warning(
            "%d of %d detections in %s are left out: %s lists no such images (first image_id: %r).",
            *(len(foreign), len(detections), path, annotated, foreign[0].image_id),
        )
    return here


def _of_known_categories(truth: GroundTruth, detections: list[Detection], path: str | Path) -> list[Detection]:
    annotated = truth.instances.path
    known = [d for d in detections if d.category_id in truth.categories]
    if not known:
        raise DataError(
            f"no category of the detections in {path} is in {annotated}: category ids are such as "
            f"{detections[0].category_id!r} there and {next(iter(truth.categories))!r} in the annotations. Use the "
            "annotations' category ids in the detections (not positions, not names)."
        )
    if len(known) < len(detections):
        names = ", ".join(
            map(repr, sorted({d.category_id for d in detections}.difference(truth.categories), key=str)[:5])
        )
        logger.warning(
            "%d of %d detections left out: their categories (%s) are not in %s.",
            *(len(detections) - len(known), len(detections), names, annotated),
        )
    return known


def _check_overlaps(truth: GroundTruth, detections: Sequence[Sequence[Detection]], path: str | Path) -> None:
    """Compares detections with the objects that they overlap: form of the boxes, then categories.

    Raises:
        DataError: The boxes fit the objects only as x1, y1, x2, y2, or the categories only as positions.
    """
    # By detection: position of its category, best overlap as it is and as x1, y1, x2, y2, categories found so.
    as_is, turned, own, hit = [], [], [], []
    for i, found in enumerate(detections):
        objects = truth.singles(i)
        if not found or not objects:
            continue
        theirs = np.array([item.box for item in objects], dtype=np.float64)
        boxes = np.array([d.bbox for d in found], dtype=np.float64)
        overlap = _box_iou(boxes, theirs)
        as_is += overlap.max(axis=1).tolist()
        turned += _box_iou(np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1), theirs).max(1).tolist()
        for d, row in zip(found, overlap):
            own.append(truth.categories[d.category_id])
            hit.append({objects[j].category for j in np.flatnonzero(row >= FOUND_IOU)})
    fits, fits_turned = (np.array(values) >= FOUND_IOU for values in (as_is, turned))
    if fits_turned.sum() >= MIN_FOUND and fits_turned.sum() > 2 * fits.sum():
        raise DataError(
            f"{fits_turned.sum()} boxes of the detections in {path} fit an object as x1, y1, x2, y2, and only "
            f"{fits.sum()} as x, y, width, height, which COCO needs: width = x2 - x1, height = y2 - y1."
        )
    matched = [(position, categories) for position, categories in zip(own, hit) if categories]
    if len(matched) >= MIN_FOUND:
        _check_categories(truth, matched, path)


def _check_categories(truth: GroundTruth, matched: Sequence[tuple[int, set[int]]], path: str | Path) -> None:
    """Compares a detection's category with those of the objects that it overlaps, both as positions.

    Raises:
        DataError: The ids are positions in the list of categories, as a detector trained on positions writes them.
    """
    right = sum(position in categories for position, categories in matched)
    said = f"of {len(matched)} detections in {path} that overlap an object, {right} have its category"
    ids = list(truth.categories)
    in_order = sorted(ids, key=lambda value: (isinstance(value, str), value))
    for first in (0, 1):
        meant = [_at(in_order, ids[position], first) for position, _ in matched]
        explained = sum(truth.categories.get(value) in found for value, (_, found) in zip(meant, matched))
        if explained >= 0.9 * len(matched) and explained > right + 0.05 * len(matched):
            raise DataError(
                f"{said}, but {explained} do if the category ids are positions, counted from {first}. Write the "
                f"category ids of {truth.instances.path} (here {in_order[0]!r} to {in_order[-1]!r})."
            )
    if right < 0.8 * len(matched):
        logger.warning(
            "%s. A mask counts only in its own category; are the category ids those of %s?", said, truth.instances.path
        )


def _at(ids: Sequence[Id], position: Id, first: int) -> Id | None:
    """The id at a position counted from ``first``; None where there is none."""
    index = position - first if isinstance(position, int) else -1
    return ids[index] if 0 <= index < len(ids) else None


def _box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU ``(N, M)`` of boxes XYWH; boxes without area overlap nothing."""
    a = np.where((a[:, 2:] > 0).all(axis=1, keepdims=True), a, 0.0)
    return np.asarray(mask_utils.iou(a, b, [0] * len(b))).reshape(len(a), len(b))
