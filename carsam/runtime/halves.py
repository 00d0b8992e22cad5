"""A model whose two halves run elsewhere than in torch: image to embeddings, embeddings and prompts to masks."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

# Names of what a decoder's file takes beside the tensors of the image; see carsam.models.family.Halves.
PROMPTS = ("points", "labels", "mask", "has_mask")
NO_POINT, TOP_LEFT, BOTTOM_RIGHT = -1.0, 2.0, 3.0
# The single mask and the three others.
ALL_MASKS = 4


class Session(Protocol):
    """A file of a model, opened by some runtime."""

    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs in the order of the file."""


class Halves:
    """Both halves of a model as sessions.

    Args:
        encoder: ``pixel_values`` to the tensors of an image.
        decoder: These and prompts to all masks' logits and predicted IoU.
        shapes: Of the image's tensors, by name.
        mask_side: Of mask inputs, in pixels.
        runtime: What computes, for people and for keys: name and version.
        box_ends_in_no_point: See :class:`carsam.models.family.Family`.
    """

    def __init__(
        self,
        encoder: Session,
        decoder: Session,
        shapes: dict[str, tuple[int, ...]],
        mask_side: int,
        runtime: str,
        box_ends_in_no_point: bool = False,
    ):
        self.box_ends_in_no_point = box_ends_in_no_point
        self.encoder, self.decoder, self.shapes = encoder, decoder, shapes
        self.mask_side, self.runtime = mask_side, runtime

    def __deepcopy__(self, memo: dict) -> Halves:
        """The same: an opened file is not copied with a model."""
        return self

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Image embeddings of preprocessed images (B, 3, S, S).

        Returns:
            (B, C, h, w); where an image has several tensors, all their numbers one after the other, (B, n, 1, 1).
        """
        images = [self.encoder.run({"pixel_values": image[None]}) for image in _array(pixel_values)]
        if len(self.shapes) == 1:
            return torch.from_numpy(np.concatenate([tensors[0] for tensors in images]))
        flat = [np.concatenate([tensor.ravel() for tensor in tensors]) for tensors in images]
        return torch.from_numpy(np.stack(flat))[..., None, None]

    def all_masks(
        self,
        image_embeddings: Tensor,
        points: Tensor | None = None,
        labels: Tensor | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All masks of B prompts, which are already checked.

        Args:
            image_embeddings: From :meth:`encode_image`, of one image.
            points, labels, boxes, masks: As :func:`carsam.models.forward.predict_logits` takes them.

        Returns:
            Logits (B, M, h, w), the single mask first, and predicted IoU (B, M).
        """
        count = 1 if masks is None else masks.shape[0]
        coordinates, kinds = prompt_points(points, labels, boxes, count, self.box_ends_in_no_point)
        if not len(coordinates):
            empty = torch.zeros(0, ALL_MASKS, self.mask_side, self.mask_side)
            return empty, empty[:, :, 0, 0]
        mask = np.zeros((1, 1, self.mask_side, self.mask_side), np.float32) if masks is None else _array(masks)
        prompts = coordinates, kinds, mask, np.full(len(mask), masks is not None, np.float32)
        logits, iou = self.decoder.run({**self._image(image_embeddings), **dict(zip(PROMPTS, prompts))})
        return torch.from_numpy(logits), torch.from_numpy(iou)

    def _image(self, embeddings: Tensor) -> dict[str, np.ndarray]:
        """The tensors of one image by name."""
        values = _array(embeddings)
        if len(self.shapes) == 1:
            return dict.fromkeys(self.shapes, values)
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        parts = np.split(values.ravel(), np.cumsum(sizes)[:-1])
        return {name: part.reshape(shape) for (name, shape), part in zip(self.shapes.items(), parts)}


def prompt_points(
    points: Tensor | None, labels: Tensor | None, boxes: Tensor | None, count: int, box_ends_in_no_point: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Points and boxes as points with labels, in segment-anything's order.

    Args:
        points: (B, N, 2), or None.
        labels: (B, N), or None.
        boxes: (B, 4) or (B, 1, 4), or None.
        count: Prompts where there is neither.
        box_ends_in_no_point: See :class:`carsam.models.family.Family`.

    Returns:
        (B, M, 2) and (B, M) float32: the points, and the corners of the box; without a box a point that is none.
    """
    coordinates, kinds = np.zeros((count, 0, 2), np.float32), np.zeros((count, 0), np.float32)
    if points is not None:
        coordinates, kinds = _array(points), _array(labels)
    if boxes is not None:
        corners = _array(boxes).reshape(-1, 2, 2)
        both = np.tile(np.array([TOP_LEFT, BOTTOM_RIGHT], np.float32), (len(corners), 1))
        if points is None:
            coordinates, kinds = corners, both
        else:
            coordinates, kinds = np.concatenate([coordinates, corners], 1), np.concatenate([kinds, both], 1)
    if box_ends_in_no_point if boxes is not None else points is not None:
        coordinates = np.pad(coordinates, ((0, 0), (0, 1), (0, 0)))
        kinds = np.pad(kinds, ((0, 0), (0, 1)), constant_values=NO_POINT)
    return coordinates, kinds


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().to("cpu", torch.float32).numpy())
