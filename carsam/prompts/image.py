"""An image with its box prompts: what calibration, diagnosis and evaluation hand to a model.

Each chooses images and boxes by rules of its own (:mod:`carsam.prompts.calibration`, :mod:`carsam.prompts.diagnosis`,
:mod:`carsam.prompts.evaluation`); the way from an image and its boxes to the model's input is here, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_utils
from torch import Tensor

from carsam.data.boxes import clip_boxes
from carsam.data.coco.annotations import CocoImage, Rle
from carsam.data.coco.instances import CocoInstances
from carsam.data.images.transforms import Geometry

# Smaller objects are noise at SAM's resolution of one mask cell for 4 × 4 input pixels.
MIN_BOX_AREA = 100.0
# Pixels a side from which on an image has as many tokens as several small ones, and a pass over it takes long.
LARGE = 512
# Prompts decoded at once.
PROMPTS_PER_BATCH = 16


@dataclass(frozen=True)
class PromptedImage:
    """One image with its box prompts.

    Attributes:
        name: File name.
        pixel_values: ``(1, 3, S, S)`` float32, preprocessed, on the CPU.
        boxes: ``(P, 4)`` float32 XYXY in pixels of the input frame.
        geometry: How the image lies in the input frame; None where nothing leads back to the image.
        image_boxes: The same boxes in pixels of the image file, float64; None without ``geometry``.
        truth: Masks of the objects in the boxes; None where they are not known.
        read: Reads the image again, ``(H, W, 3)`` uint8 RGB (photographs are not kept); None where nobody needs to.
    """

    name: str
    pixel_values: Tensor = field(repr=False)
    boxes: Tensor
    geometry: Geometry | None = None
    image_boxes: np.ndarray | None = field(default=None, repr=False)
    truth: tuple[Rle, ...] | None = field(default=None, repr=False)
    read: Callable[[], np.ndarray] | None = field(default=None, repr=False)

    @property
    def large(self) -> bool:
        """Whether the model's input frame has more than :data:`LARGE` pixels a side."""
        return self.pixel_values.shape[-1] > LARGE

    @classmethod
    def with_image_boxes(
        cls,
        name: str,
        pixel_values: Tensor,
        geometry: Geometry,
        image_boxes: np.ndarray,
        *,
        truth: tuple[Rle, ...] | None = None,
        read: Callable[[], np.ndarray] | None = None,
    ) -> PromptedImage:
        """From boxes ``(P, 4)`` XYXY in pixels of the image file."""
        boxes = torch.from_numpy(geometry.boxes_to_input(image_boxes)).float()
        return cls(name, pixel_values, boxes, geometry, image_boxes, truth, read)

    @classmethod
    def with_input_boxes(
        cls,
        name: str,
        pixel_values: Tensor,
        geometry: Geometry,
        boxes: Tensor,
        *,
        read: Callable[[], np.ndarray] | None = None,
    ) -> PromptedImage:
        """From boxes ``(P, 4)`` float32 XYXY in pixels of the input frame."""
        return cls(name, pixel_values, boxes, geometry, geometry.boxes_to_original(boxes.numpy()), read=read)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a model is given of it: two images are the same data where these are equal."""
        return self.pixel_values, self.boxes

    def true_mask(self, index: int) -> np.ndarray | None:
        """Mask ``(H, W)`` bool of a prompt's object; None where it is not known."""
        return mask_utils.decode(self.truth[index]).astype(bool) if self.truth is not None else None

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Arguments of the model for a pass with all boxes as prompts and one mask each."""
        return {
            "pixel_values": self.pixel_values.to(device),
            "input_boxes": self.boxes[None].to(device),
            "multimask_output": False,
        }


def object_boxes(instances: CocoInstances, image: CocoImage) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of an image's objects, and which of them can be prompts where prompts are chosen freely.

    Args:
        instances: The annotations.
        image: Of them; its size may be unknown.

    Returns:
        Boxes ``(N, 4)`` XYXY of the objects that are no crowds, in the order of the file, clipped to the image; and
        which of them have at least 100 px² then, ``(N,)`` bool.
    """
    return clip_boxes(instances.boxes(image.id), image.known_size, MIN_BOX_AREA)
