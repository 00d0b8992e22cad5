"""Arithmetic of boxes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def xywh_to_xyxy(boxes: Iterable[Iterable[float]]) -> np.ndarray:
    """Boxes ``(N, 4)`` XYWH as XYXY, float64."""
    boxes = np.array([list(b) for b in boxes], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def clip_boxes(boxes: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Clips boxes to an image and tells which have an area inside it.

    Args:
        boxes: ``(N, 4)`` XYXY in pixels.
        size: ``(h, w)`` of the image.

    Returns:
        Clipped boxes ``(N, 4)`` and their validity ``(N,)`` bool; boxes that are not finite are not valid.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    finite = np.isfinite(boxes).all(axis=1)
    height, width = size
    clipped = np.where(finite[:, None], boxes, 0.0).clip(0, [width, height, width, height])
    return clipped, finite & (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])


def clean_boxes(boxes: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Clips boxes to an image and drops those without area or entirely outside.

    Args:
        boxes: ``(N, 4)`` XYXY in pixels.
        size: ``(h, w)`` of the image.

    Returns:
        The kept boxes ``(K, 4)`` in their order, and the number dropped.
    """
    clipped, valid = clip_boxes(boxes, size)
    return clipped[valid], int((~valid).sum())
