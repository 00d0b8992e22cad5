"""Arithmetic of boxes in pixels of an image."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def xywh_to_xyxy(boxes: Iterable[Iterable[float]]) -> np.ndarray:
    """Boxes ``(N, 4)`` XYWH as XYXY, float64."""
    boxes = np.array([list(b) for b in boxes], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def clip_boxes(boxes: np.ndarray, size: tuple[int, int] | None, min_area: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Clips boxes to an image and tells which of them are usable: finite, with an area inside it.

    Args:
        boxes: ``(N, 4)`` XYXY in pixels.
        size: ``(h, w)`` of the image; None where it is not known: only the left and upper border clip then.
        min_area: Smallest area of a usable box after clipping, in px².

    Returns:
        Clipped boxes ``(N, 4)``, and which are usable ``(N,)`` bool.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    finite = np.isfinite(boxes).all(axis=1)
    height, width = size or (np.inf, np.inf)
    clipped = np.where(finite[:, None], boxes, 0.0).clip(0, [width, height, width, height])
    sides = clipped[:, 2:] - clipped[:, :2]
    return clipped, finite & (sides > 0).all(axis=1) & (sides.prod(axis=1) >= min_area)
