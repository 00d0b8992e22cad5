"""Masks as run lengths: column by column, background first, as COCO has them."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as mask_utils


def mask_to_counts(mask: np.ndarray) -> np.ndarray:
    """Run lengths of a mask ``(H, W)`` bool: ``(R,)`` int64, the first of background (0 where there is none)."""
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(edges, prepend=0, append=flat.size)
    return np.concatenate([[0], counts]) if flat.size and flat[0] else counts


def counts_to_mask(counts: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mask ``(H, W)`` bool of run lengths; ``size`` is ``(h, w)``."""
    height, width = size
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(width, height).T


def counts_to_rle(counts: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's compressed RLE, ``{"size": [h, w], "counts": text}``, ready for JSON."""
    rle = mask_utils.frPyObjects({"size": list(size), "counts": [int(n) for n in counts]}, *size)
    return {"size": list(size), "counts": rle["counts"].decode("ascii")}


def counts_area(counts: np.ndarray) -> int:
    """Pixels of the mask."""
    return int(counts[1::2].sum())


def counts_box(counts: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Tight box of the mask as x, y, width, height; zeros for an empty mask."""
    height = size[0]
    ends = np.cumsum(counts)
    first, last = ends[:-1:2], ends[1::2] - 1  # of each run, as positions in column order
    runs = last >= first
    first, last = first[runs], last[runs]
    if not len(first):
        return 0, 0, 0, 0
    left, right = int(first.min()) // height, int(last.max()) // height
    # A run that goes on into the next column covers the last row of one and the first row of the other.
    whole = first // height != last // height
    top = 0 if whole.any() else int((first % height).min())
    bottom = height - 1 if whole.any() else int((last % height).max())
    return left, top, right - left + 1, bottom - top + 1
