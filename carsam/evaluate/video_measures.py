"""J and F, how DAVIS measures the masks of a video (Perazzi et al., CVPR 2016; Pont-Tuset et al., 2017).

J is the overlap of regions. F is how well the contours meet: precision and recall of the boundary's pixels, where a
pixel counts as met within 0.8 % of the image's diagonal. Numbers are those of DAVIS's own code (davis2017-evaluation)
and of ``trackeval``, computed on arrays instead of in its loops, and on points instead of dilated images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

# Of the image's diagonal: how far off a pixel of the boundary may lie.
TOLERANCE = 0.008
_QUARTERS = 4


def region_similarity(found: np.ndarray, true: np.ndarray) -> float:
    """J: intersection over union of two masks ``(h, w)`` bool; 1 where both are empty."""
    union = np.count_nonzero(found | true)
    return float(np.count_nonzero(found & true) / union) if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """The boundary of a mask ``(h, w)`` bool: pixels that differ from their neighbour right, below, or right below.

    At the last row and column only the neighbour that exists counts, and the last pixel never does, as in the code of
    the Berkeley benchmark that DAVIS uses.
    """
    edge = np.zeros_like(mask)
    right, below = mask[:, :-1] ^ mask[:, 1:], mask[:-1] ^ mask[1:]
    edge[:, :-1] |= right
    edge[:-1] |= below
    edge[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    # DAVIS compares these with zeros first and then overwrites them: what differs from a neighbour outside is no edge
    edge[-1, :-1], edge[:-1, -1], edge[-1, -1] = right[-1], below[:, -1], False
    return edge


def contour_accuracy(found: np.ndarray, true: np.ndarray) -> float:
    """F: harmonic mean of precision and recall of the boundary of two masks ``(h, w)`` bool.

    1 where neither has a boundary, 0 where only one has.
    """
    ours, theirs = (np.argwhere(boundary(mask)) for mask in (found, true))
    if not len(ours) or not len(theirs):
        return float(len(ours) == len(theirs))
    radius = math.ceil(TOLERANCE * float(np.linalg.norm(true.shape)))
    precision, recall = _met(ours, theirs, radius), _met(theirs, ours, radius)
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _met(points: np.ndarray, others: np.ndarray, radius: int) -> float:
    """Share of points that have one of the others within ``radius``: what a dilation by a disk would cover."""
    # Squares of distances are whole numbers, so half a pixel more leaves no doubt at the border.
    distances, _ = cKDTree(others).query(points, distance_upper_bound=radius + 0.5)
    return np.count_nonzero(distances <= radius) / len(points)


@dataclass(frozen=True, slots=True)
class Summary:
    """A measure over the frames of one object, as fractions of 1.

    Attributes:
        mean: Over the frames.
        recall: Share of the frames above 0.5.
        decay: Mean of the first quarter less that of the last; what is lost as the video goes on.
    """

    mean: float
    recall: float
    decay: float


def summarise(values: Sequence[float]) -> Summary:
    """Mean, recall and decay of one object's values, a frame each, as DAVIS defines them.

    Raises:
        ValueError: There are no values.
    """
    if not len(values):
        raise ValueError("there are no frames to summarise.")
    array = np.asarray(values, dtype=np.float64)
    # Quarters share their first and last frame.
    ends = np.round(np.linspace(1, len(array), _QUARTERS + 1) + 1e-10).astype(int) - 1
    first, last = array[ends[0] : ends[1] + 1], array[ends[-2] : ends[-1] + 1]
    above = array > 0.5 + np.finfo(float).eps
    return Summary(float(array.mean()), float(above.mean()), float(first.mean() - last.mean()))
