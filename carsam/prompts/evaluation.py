"""Box prompts of an evaluation: the objects' own boxes, or a detector's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from carsam.data.boxes import clip_boxes, xywh_to_xyxy
from carsam.data.coco.annotations import Rle
from carsam.data.coco.ground_truth import GroundTruth
from carsam.data.images.transforms import Preprocessor
from carsam.errors import DataError
from carsam.prompts.detections import matching_detections
from carsam.prompts.image import PromptedImage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
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


def box_prompts(truth: GroundTruth, detections: str | Path | None = None) -> list[list[Prompt]]:
    """The box prompts of every image, clipped to it.

    Args:
        truth: Images and objects, whose own boxes are the prompts without ``detections``.
        detections: COCO detection results.

    Raises:
        DataError: The file is missing or not valid, does not fit the annotations, or no box has an area inside its
            image.
    """
    if detections is None:
        prompts = [
            [Prompt(_xyxy(item.box), item.category, 1.0, item.mask) for item in truth.singles(i)]
            for i in range(len(truth.images))
        ]
    else:
        prompts = [
            [Prompt(_xyxy(d.bbox), truth.categories[d.category_id], d.score, None) for d in found]
            for found in matching_detections(truth, detections)
        ]
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


def evaluation_image(truth: GroundTruth, index: int, prompts: list[Prompt], preprocess: Preprocessor) -> PromptedImage:
    """Reads an image for its prompts.

    Args:
        truth: The images.
        index: Position of the image.
        prompts: Of this image, at least one.
        preprocess: What the model needs.

    Raises:
        DataError: It cannot be read, or has another size than the file says.
    """
    pixel_values, geometry = preprocess(truth.read_image(index))
    boxes = np.array([prompt.box for prompt in prompts])
    targets = tuple(prompt.target for prompt in prompts if prompt.target is not None)
    known = targets if len(targets) == len(prompts) else None
    return PromptedImage.with_image_boxes(truth.images[index].file_name, pixel_values, geometry, boxes, truth=known)


def _xyxy(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    return tuple(xywh_to_xyxy([box])[0].tolist())
