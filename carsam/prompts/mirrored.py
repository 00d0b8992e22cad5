"""Calibration images once more, mirrored: twice as much to fit to, from the same images."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from carsam.prompts.calibration import CalibrationSet
from carsam.prompts.image import PromptedImage

logger = logging.getLogger(__name__)

# Where every so manieth image judges what the others teach, an image and its mirror image should be on one side.
JUDGED = 4


def mirrored(image: PromptedImage) -> PromptedImage | None:
    """The image with left and right exchanged, and its boxes; None where it is not known how it lies in the input.

    The padding stays at the right.
    """
    if image.geometry is None:
        return None
    width = image.geometry.input_size[1]
    pixels = image.pixel_values.clone()
    pixels[..., :width] = pixels[..., :width].flip(-1)
    left, top, right, bottom = image.boxes.unbind(-1)
    boxes = torch.stack([width - right, top, width - left, bottom], -1)
    # Nothing leads back to the image file, which is not mirrored.
    return replace(
        image,
        name=f"{image.name} (mirrored)",
        pixel_values=pixels,
        boxes=boxes,
        geometry=None,
        image_boxes=None,
        truth=None,
        read=None,
    )


def with_mirrored(data: CalibrationSet) -> CalibrationSet:
    """The set, and behind it its mirror images, each at a number that leaves the rest of 4 that its image's does.

    Clips, and images of which it is not known how they lie in the input, have none; a warning says so.
    """
    images = data.images
    turn = len(images) % JUDGED
    ordered = [*images[turn:], *images[:turn]]
    found = (mirrored(image) for image in ordered if type(image) is PromptedImage)
    copies = [each for each in found if each is not None]
    if len(copies) < len(images):
        logger.warning(
            "%d of %d calibration images are not mirrored: clips, or images without geometry.",
            len(images) - len(copies),
            len(images),
        )
    both = CalibrationSet.of([*images, *copies], data.skipped)
    return replace(both, embeddings=data.embeddings)
