"""Masks of everything in an image, with the interface of segment-anything's ``SamAutomaticMaskGenerator``.

A grid of points is prompted, on the image and on crops of it; masks that the model is unsure of are dropped, and so are
duplicates. Every mask is kept as run lengths, and only a few are in memory at full size at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from carsam.data.coco.rle import counts_area, counts_to_mask, counts_to_rle, mask_to_counts
from carsam.predict.predictor import CHUNK_PIXELS, SamPredictor, predict_logits, require_image
from carsam.prompts.proposals import mask_boxes, non_maximum_suppression, point_grid, stability_score

OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")
# A mask that ends this close to the edge of its crop is probably cut off there.
_EDGE_PIXELS = 20

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Found:
    """A mask, as run lengths over the whole image, with XYXY boxes (last pixel included) in pixels of it."""

    counts: np.ndarray
    box: Box
    predicted_iou: float
    stability: float
    point: tuple[float, float]
    crop: Box


class SamAutomaticMaskGenerator:
    """Finds masks of everything in an image.

    Args:
        model: A model, float or packed, or the folder, file or Hub id of one.
        points_per_side: Points along each side of the grid; None where ``point_grids`` gives them.
        points_per_batch: Points decoded at a time: more are faster and need more memory.
        pred_iou_thresh: The model's own judgement of a mask, 0..1, below which it goes.
        stability_score_thresh: How little the mask changes when its threshold does, 0..1, below which it goes.
        stability_score_offset: By how much the threshold is moved for that, in logits.
        box_nms_thresh: Masks of one crop whose boxes overlap a better one's by more than this IoU go.
        crop_n_layers: Also looks at crops of the image: 2 × 2, 4 × 4, ... up to this many layers.
        crop_nms_thresh: As ``box_nms_thresh``, between crops.
        crop_overlap_ratio: Overlap of the crops in the first layer, as a share of the image's short side.
        crop_n_points_downscale_factor: Points along a side are divided by this in each layer.
        point_grids: Points ``(N, 2)`` as (x, y) on 0..1, a grid for the image and for each layer.
        min_mask_region_area: Separate pieces and holes of fewer pixels are removed.
        output_mode: ``binary_mask``, ``uncompressed_rle`` or ``coco_rle``.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[np.ndarray] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
    ) -> None:
        if (points_per_side is None) == (point_grids is None):
            raise ValueError("give either points_per_side or point_grids.")
        if output_mode not in OUTPUT_MODES:
            raise ValueError(f"output_mode must be one of {', '.join(OUTPUT_MODES)}, not {output_mode!r}.")
        for name, value, low in (
            ("points_per_batch", points_per_batch, 1),
            ("crop_n_layers", crop_n_layers, 0),
            ("crop_n_points_downscale_factor", crop_n_points_downscale_factor, 1),
            ("min_mask_region_area", min_mask_region_area, 0),
        ):
            if not value >= low:
                raise ValueError(f"{name} must be at least {low}, not {value}.")
        if not 0 <= crop_overlap_ratio < 1:
            raise ValueError(f"crop_overlap_ratio must be at least 0 and below 1, not {crop_overlap_ratio}.")
        if point_grids is None:
            self.point_grids = _grids(points_per_side, crop_n_layers, crop_n_points_downscale_factor)
        else:
            self.point_grids = [_checked_grid(grid) for grid in point_grids]
            if len(self.point_grids) <= crop_n_layers:
                raise ValueError(
                    f"point_grids needs {crop_n_layers + 1} grids, for the image and {crop_n_layers} layers of crops, "
                    f"not {len(self.point_grids)}."
                )
        self.predictor = SamPredictor(model)
        self.points_per_batch = points_per_batch
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh = stability_score_thresh
        self.stability_score_offset = stability_score_offset
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.crop_n_points_downscale_factor = crop_n_points_downscale_factor
        self.min_mask_region_area = min_mask_region_area
        self.output_mode = output_mode

    def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
        """Finds the masks of an image.

        Args:
            image: ``(H, W, 3)`` uint8 RGB.

        Returns:
            A record a mask: ``segmentation`` (``(H, W)`` bool, or RLE as ``output_mode`` says), ``area`` in pixels,
            ``bbox`` as x, y, width, height between the outermost pixels (as segment-anything has it, so that one pixel
            has width 0), ``predicted_iou``, ``point_coords`` (the point that found it), ``stability_score``, and
            ``crop_box`` as x, y, width, height. Masks without a pixel are left out.

        Raises:
            ValueError: It is no such image; the message says how to make it one.
        """
        require_image(image)
        size = image.shape[:2]
        return [self._record(found, size) for found in self._find(image)]

    def _record(self, found: _Found, size: tuple[int, int]) -> dict[str, Any]:
        if self.output_mode == "binary_mask":
            segmentation: Any = counts_to_mask(found.counts, size)
        elif self.output_mode == "coco_rle":
            segmentation = counts_to_rle(found.counts, size)
        else:
            segmentation = {"size": list(size), "counts": found.counts.tolist()}
        return {
            "segmentation": segmentation,
            "area": counts_area(found.counts),
            "bbox": _xywh(found.box),
            "predicted_iou": found.predicted_iou,
            "point_coords": [list(found.point)],
            "stability_score": found.stability,
            "crop_box": _xywh(found.crop),
        }

    def _find(self, image: np.ndarray) -> list[_Found]:
        size = image.shape[:2]
        found: list[_Found] = []
        crops = list(crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio))
        for crop, layer in crops:
            found += self._search_crop(image, crop, self.point_grids[layer])
        if len(crops) > 1:
            # The smaller crop shows an object in finer detail.
            found = _without_duplicates(found, [1 / _box_area(f.crop) for f in found], self.crop_nms_thresh)
        if self.min_mask_region_area > 0:
            cleaned = [_clean(f, size, self.min_mask_region_area) for f in found]
            # Of two that became alike, the one that needed no cleaning stays.
            unchanged = [float(new is old) for new, old in zip(cleaned, found)]
            found = _without_duplicates(cleaned, unchanged, max(self.box_nms_thresh, self.crop_nms_thresh))
        return found

    def _search_crop(self, image: np.ndarray, crop: Box, grid: np.ndarray) -> list[_Found]:
        """The masks that the grid's points find in a crop, without duplicates."""
        x0, y0, x1, y1 = crop
        self.predictor.set_image(image[y0:y1, x0:x1])
        points = grid * np.array([x1 - x0, y1 - y0])
        found: list[_Found] = []
        for start in range(0, len(points), self.points_per_batch):
            found += self._decode(points[start : start + self.points_per_batch], crop, image.shape[:2])
        self.predictor.reset_image()
        return _without_duplicates(found, [f.predicted_iou for f in found], self.box_nms_thresh)

    def _decode(self, points: np.ndarray, crop: Box, size: tuple[int, int]) -> Iterator[_Found]:
        """The good masks of some points, three tried for each point."""
        predictor, threshold = self.predictor, self.predictor.mask_threshold
        coords = predictor.transform.apply_coords(points, predictor.original_size)
        low_res, iou = predict_logits(
            predictor.model,
            predictor.features,
            points=torch.as_tensor(coords, dtype=torch.float, device=predictor.device)[:, None],
            labels=torch.ones((len(points), 1), device=predictor.device),
            multimask_output=True,
        )
        of_point = torch.arange(len(points)).repeat_interleave(low_res.shape[1])
        low_res, iou = low_res.flatten(0, 1), iou.flatten()
        sure = (iou > self.pred_iou_thresh) if self.pred_iou_thresh > 0 else torch.ones_like(iou, dtype=torch.bool)
        chosen = sure.nonzero()[:, 0]

        geometry = predictor.geometry
        step = max(1, CHUNK_PIXELS // (geometry.original_size[0] * geometry.original_size[1]))
        for indices in chosen.split(step):
            logits = geometry.masks_to_original(low_res[indices], predictor.preprocessor.image_size)
            stability = stability_score(logits, self.stability_score_offset, threshold)
            masks = logits > threshold
            del logits
            good = masks.flatten(1).any(-1)
            if self.stability_score_thresh > 0:
                good &= stability >= self.stability_score_thresh
            boxes = mask_boxes(masks)
            for i in good.nonzero()[:, 0].tolist():
                index = int(indices[i])
                box = _to_image(boxes[i], crop)
                if not _cut_off(box, crop, size):
                    mask = _uncrop(masks[i].cpu().numpy(), crop, size)
                    x, y = points[of_point[index]]
                    point = (float(x) + crop[0], float(y) + crop[1])
                    yield _Found(mask_to_counts(mask), box, float(iou[index]), float(stability[i]), point, crop)


def crop_boxes(size: tuple[int, int], n_layers: int, overlap_ratio: float) -> Iterator[tuple[Box, int]]:
    """Yields the whole image and then the crops of each layer, as XYXY boxes with the layer's number.

    Args:
        size: ``(h, w)`` of the image.
        n_layers: Layer n has 2ⁿ × 2ⁿ crops.
        overlap_ratio: Overlap in the first layer, as a share of the short side; it halves with every layer.
    """
    height, width = size
    yield (0, 0, width, height), 0
    for layer in range(1, n_layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(size) * 2 / count)
        spans = [_spans(length, count, overlap) for length in (width, height)]
        for left, right in spans[0]:
            for top, bottom in spans[1]:
                if left < right and top < bottom:  # a small image has no pixels for all crops
                    yield (left, top, right, bottom), layer


def _spans(length: int, count: int, overlap: int) -> list[tuple[int, int]]:
    side = ceil((overlap * (count - 1) + length) / count)
    return [(i * (side - overlap), min(i * (side - overlap) + side, length)) for i in range(count)]


def _grids(side: int, n_layers: int, factor: int) -> list[np.ndarray]:
    sides = [int(side / factor**layer) for layer in range(n_layers + 1)]
    if min(sides) < 1:
        raise ValueError(
            f"points_per_side {side} leaves no point in layer {sides.index(0)} of the crops; give more points, fewer "
            "crop_n_layers, or a smaller crop_n_points_downscale_factor."
        )
    return [point_grid(n).numpy() for n in sides]


def _checked_grid(grid: Any) -> np.ndarray:
    try:
        points = np.asarray(grid, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a grid of point_grids must be an array (N, 2): {error}.") from error
    if points.ndim != 2 or points.shape[1] != 2 or not ((points >= 0) & (points <= 1)).all():
        raise ValueError(f"a grid of point_grids must be (N, 2) as (x, y) on 0..1, not {points.shape} in pixels.")
    return points


def _to_image(box: Tensor, crop: Box) -> Box:
    left, top, right, bottom = (int(side) for side in box)
    return left + crop[0], top + crop[1], right - 1 + crop[0], bottom - 1 + crop[1]


def _cut_off(box: Box, crop: Box, size: tuple[int, int]) -> bool:
    """Whether a mask ends at an edge of its crop that is not the image's."""
    image = (0, 0, size[1], size[0])
    near = [[abs(side - edge) <= _EDGE_PIXELS for side, edge in zip(box, frame)] for frame in (crop, image)]
    return any(at_crop and not at_image for at_crop, at_image in zip(*near))


def _uncrop(mask: np.ndarray, crop: Box, size: tuple[int, int]) -> np.ndarray:
    if mask.shape == size:
        return mask
    whole = np.zeros(size, dtype=bool)
    whole[crop[1] : crop[3], crop[0] : crop[2]] = mask
    return whole


def _without_duplicates(found: list[_Found], scores: list[float], threshold: float) -> list[_Found]:
    boxes = torch.tensor([f.box for f in found], dtype=torch.float32).reshape(-1, 4)
    kept = non_maximum_suppression(boxes, torch.tensor(scores, dtype=torch.float32), threshold)
    return [found[i] for i in kept.tolist()]


def _clean(found: _Found, size: tuple[int, int], min_area: int) -> _Found:
    """Without holes and separate pieces of fewer than ``min_area`` pixels; the same object where there are none."""
    mask = counts_to_mask(found.counts, size)
    cleaned = remove_small_regions(mask, min_area)
    if np.array_equal(cleaned, mask):
        return found
    left, top, right, bottom = (int(v) for v in mask_boxes(torch.from_numpy(cleaned)[None])[0])
    return replace(found, counts=mask_to_counts(cleaned), box=(left, top, right - 1, bottom - 1))


def remove_small_regions(mask: np.ndarray, min_area: int) -> np.ndarray:
    """Fills holes and then removes separate pieces of fewer than ``min_area`` pixels; the largest piece stays.

    Pixels that touch at a corner are connected, in holes as well as in pieces.
    """
    holes = _small_regions(~mask, min_area, keep_largest=False)
    filled = mask | holes
    return filled & ~_small_regions(filled, min_area, keep_largest=True)


def _small_regions(mask: np.ndarray, min_area: int, keep_largest: bool) -> np.ndarray:
    from scipy import ndimage

    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel())
    small = areas < min_area
    small[0] = False
    if keep_largest and len(areas) > 1 and small[1:].all():
        small[1 + areas[1:].argmax()] = False
    return small[labels]


def _xywh(box: Box) -> list[int]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]


def _box_area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])
