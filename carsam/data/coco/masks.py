"""Segmentations of a COCO file (polygons, plain and compressed RLE) as checked, compressed RLE.

pycocotools trusts what it is given: a coordinate that is not a number takes all memory, run lengths that exceed the
image are written beyond it. Everything is checked before it gets there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from carsam.data.coco.annotations import Rle, is_coordinate, shown

# Points may lie outside the image, as some tools write them, by this many times its longer side.
MAX_OUTSIDE = 10
# pycocotools walks along the outline, five points a pixel: this many pixels take about 0.3 GB.
MAX_OUTLINE = 2_000_000

_FORMS = "polygons are lists of x, y, x, y, … and RLE is {size, counts}"


def to_rle(segmentation: Any, size: tuple[int, int]) -> Rle | None:
    """A segmentation as compressed RLE.

    Args:
        segmentation: Polygons (each a flat list, a list of pairs, or of ``{x, y}``; one polygon may stand without
            the outer list), or RLE with plain or compressed counts.
        size: ``(h, w)`` of the image.

    Returns:
        The RLE, or None if there is no mask: it is empty, or every polygon has fewer than three points.

    Raises:
        ValueError: It is of another form, or does not fit the image; the text says why.
    """
    if segmentation is None or segmentation == []:
        return None
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in _polygons(segmentation) if len(polygon) >= 6]
        for polygon in polygons:
            _check_polygon(polygon, size)
        if not polygons:
            return None
        return mask_utils.merge(mask_utils.frPyObjects([list(map(float, p)) for p in polygons], *size))
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise ValueError(f"it is {shown(segmentation)}; {_FORMS}")
    _check_size(segmentation.get("size"), size)
    counts = segmentation["counts"]
    if counts in (None, "", []):
        return None
    if isinstance(counts, list):
        _check_runs(_plain_runs(counts), size)
        return mask_utils.frPyObjects({"size": list(size), "counts": [int(run) for run in counts]}, *size)
    if not isinstance(counts, str):
        raise ValueError(f"its RLE counts are {shown(counts)}; {_FORMS}")
    _check_runs(compressed_runs(counts), size)
    return {"size": list(size), "counts": counts}


def tight_box(rle: Rle) -> np.ndarray:
    """Box ``(4,)`` XYXY of a mask's pixels; zeros for an empty mask."""
    x, y, width, height = mask_utils.toBbox(rle)
    return np.array([x, y, x + width, y + height])


def _polygons(value: list[Any]) -> list[list[Any]]:
    """Flat polygons, whatever way the file nests them."""
    if not isinstance(value[0], (list, dict)):
        return [_flat(value)]
    if isinstance(value[0], dict) or (len(value) >= 3 and all(isinstance(v, list) and len(v) == 2 for v in value)):
        return [_flat(value)]
    return [_flat(polygon) for polygon in value]


def _flat(polygon: Any) -> list[Any]:
    if not isinstance(polygon, list):
        raise ValueError(f"a polygon is {shown(polygon)}; {_FORMS}")
    if any(isinstance(point, (list, dict)) for point in polygon):
        return [number for point in polygon for number in _point(point)]
    return polygon


def _point(point: Any) -> tuple[Any, Any]:
    if isinstance(point, dict) and "x" in point and "y" in point:
        return point["x"], point["y"]
    if isinstance(point, list) and len(point) == 2:
        return point[0], point[1]
    raise ValueError(f"a point of a polygon is {shown(point)}; {_FORMS}")


def _check_polygon(polygon: list[Any], size: tuple[int, int]) -> None:
    if len(polygon) % 2:
        raise ValueError(f"a polygon has {len(polygon)} numbers, which are no pairs of x and y")
    wrong = next((number for number in polygon if not is_coordinate(number)), 0)
    if wrong != 0 or isinstance(wrong, bool):
        raise ValueError(f"a polygon holds {shown(wrong)}, which is no coordinate")
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    reach = MAX_OUTSIDE * max(size)
    if points.min() < -reach or points.max() > max(size) + reach:
        farthest = points.flat[np.abs(points).argmax()]
        raise ValueError(f"a polygon has the coordinate {farthest:g}, far outside an image of {size[1]} × {size[0]}")
    outline = np.abs(np.roll(points, -1, axis=0) - points).max(axis=1).sum()
    if outline > MAX_OUTLINE:
        raise ValueError(f"the outline of a polygon is {outline:.0f} pixels long, at most {MAX_OUTLINE} are read")


def _check_size(noted: Any, size: tuple[int, int]) -> None:
    if not isinstance(noted, list) or len(noted) != 2 or not all(map(is_coordinate, noted)):
        raise ValueError(f"its RLE has the size {shown(noted)}; [height, width] is needed")
    if tuple(noted) != size:
        swapped = "; height comes first, so the two may be swapped" if tuple(noted[::-1]) == size else ""
        raise ValueError(f"its RLE is of size {noted}, not {list(size)} as the image{swapped}")


def _plain_runs(counts: list[Any]) -> np.ndarray:
    wrong = next((c for c in counts if type(c) not in (int, float) or not 0 <= c < 2**32 or c != int(c)), None)
    if wrong is not None or None in counts:
        raise ValueError(f"its RLE counts hold {shown(wrong)}; whole numbers from 0 are needed")
    return np.array(counts, dtype=np.int64)


def compressed_runs(counts: str) -> np.ndarray:
    """Run lengths ``(N,)`` int64 of COCO's compressed counts: five bits a character, differences to the last but one.

    Raises:
        ValueError: The text is no such code.
    """
    codes = np.frombuffer(counts.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64) - 48
    if codes.min() < 0 or codes.max() > 63:
        raise ValueError("its RLE counts are text, but not COCO's compressed form; give them as a list of numbers")
    last = (codes & 32) == 0
    if not last[-1]:
        raise ValueError("its compressed RLE counts are cut off")
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    position = np.arange(len(codes)) - np.repeat(starts, np.diff(starts, append=len(codes)))
    if position.max() > 7:
        raise ValueError("its compressed RLE counts hold a run of more than 32 bits")
    values = np.add.reduceat((codes & 31) << (5 * position), starts)
    negative = (codes[last] & 16) != 0
    values -= np.where(negative, 1 << (5 * (position[last] + 1)), 0)
    # From the fourth run on, a value is the difference to the run two before.
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def _check_runs(runs: np.ndarray, size: tuple[int, int]) -> None:
    if runs.min() < 0:
        raise ValueError(f"its RLE has a run of {runs.min()} pixels")
    if runs.max() > size[0] * size[1] or runs.sum() != size[0] * size[1]:
        raise ValueError(f"the RLE counts {runs.sum()} pixels, but the image has {size[0] * size[1]}")
