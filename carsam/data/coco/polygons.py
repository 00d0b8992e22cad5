"""Masks as polygons that follow the edges of their pixels, so that nothing of the mask is lost."""

from __future__ import annotations

import numpy as np

# The edges around a pixel, clockwise: where the neighbour lies (row, column), and the corner (x, y) that the edge
# starts from. Every edge ends where the next one of the same pixel starts.
_EDGES = (((-1, 0), (0, 0)), ((0, 1), (1, 0)), ((1, 0), (1, 1)), ((0, -1), (0, 1)))


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Polygons of a mask, as COCO has them.

    A polygon with holes is one line: it runs along a cut to the hole, around it, and back along the same cut. Drawn by
    pycocotools, the polygons give the mask again.

    Args:
        mask: ``(H, W)`` bool.

    Returns:
        A list x1, y1, x2, y2, ... for every piece whose pixels share edges; coordinates are corners of pixels, 0..W and
        0..H. Empty for an empty mask.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return []
    top, left = rows[0], columns[0]
    starts, following, stride = _edges(mask[top : rows[-1] + 1, left : columns[-1] + 1])
    outer, holes = _loops(starts, following, stride)
    _join_holes(holes, starts, following)
    polygons = []
    for first in outer:
        codes = np.array([starts[edge] for edge in _walk(first, following)])
        corners = _turns(np.stack([codes % stride, codes // stride], axis=1))
        polygons.append((corners + np.array([left, top])).ravel().astype(float).tolist())
    return polygons


def _edges(mask: np.ndarray) -> tuple[list[int], list[int], int]:
    """The edges between mask and background, each one pixel long, with the mask at their right.

    Returns:
        For every edge the corner where it starts, as ``y * stride + x``, and the edge that follows it; and the stride.
    """
    stride = mask.shape[1] + 1
    padded = np.pad(mask, 1)
    starts, directions = [], []
    for direction, ((down, right), (x, y)) in enumerate(_EDGES):
        height, width = mask.shape
        neighbours = padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]
        row, column = np.nonzero(mask & ~neighbours)
        starts.append((row + y) * stride + column + x)
        directions.append(np.full(len(row), direction))
    start, direction = np.concatenate(starts), np.concatenate(directions)
    order = np.argsort(start, kind="stable")
    start, direction = start[order], direction[order]
    end = start + np.array([1, stride, -1, -stride])[direction]
    following = np.searchsorted(start, end)
    # Where two pixels touch at a corner, two edges start: turning right stays with the same pixel.
    other = np.minimum(following + 1, len(start) - 1)
    turns = (start[other] == end) & (direction[other] == (direction + 1) % 4)
    return start.tolist(), np.where(turns, other, following).tolist(), stride


def _walk(first: int, following: list[int]) -> list[int]:
    path = [first]
    while (edge := following[path[-1]]) != first:
        path.append(edge)
    return path


def _loops(starts: list[int], following: list[int], stride: int) -> tuple[list[int], list[int]]:
    """An edge of every outer loop, and of every hole the one that starts furthest left."""
    outer, holes = [], []
    seen = bytearray(len(starts))
    for first in range(len(starts)):
        if seen[first]:
            continue
        path = _walk(first, following)
        for edge in path:
            seen[edge] = 1
        codes = np.array([starts[edge] for edge in path])
        x, y = codes % stride, codes // stride
        clockwise = (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() > 0
        if clockwise:
            outer.append(first)
        else:
            holes.append(path[int(np.lexsort((y, x))[0])])
    return outer, sorted(holes, key=lambda edge: starts[edge] % stride)


def _join_holes(holes: list[int], starts: list[int], following: list[int]) -> None:
    """Joins every hole to what lies at its left, from left to right: both ways along the same cut."""
    at_corner = dict(zip(starts, range(len(starts))))
    before = {edge: i for i, edge in enumerate(following)}
    for hole in holes:
        corner = starts[hole]
        cut = corner - 1
        while cut not in at_corner:
            cut -= 1
        outside = at_corner[cut]
        # outside's forerunner -> (cut to the hole) -> around the hole -> (cut back) -> outside
        there, back = len(starts), len(starts) + 1
        starts += [cut, corner]
        following += [hole, outside]
        following[before[outside]] = there
        following[before[hole]] = back
        before[hole], before[outside] = there, back


def _turns(points: np.ndarray) -> np.ndarray:
    """Without the points at which a line goes straight on."""
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    return points[(np.sign(before) != np.sign(after)).any(1)]
