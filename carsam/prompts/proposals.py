"""Box prompts for unlabelled images: the model's own masks on a grid of points, or a plain grid of boxes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from carsam.models.forward import encode_image, predict_logits

POINTS_PER_SIDE = 8
# Few at once: of a SAM with a 1024 px input, 16 points with three masks each need about 1 GB, and a third more time.
POINTS_PER_BATCH = 4
# Only floors: the ranking by both chooses, and a small model's best masks serve better than a blind grid.
MIN_PREDICTED_IOU = 0.2
MIN_STABILITY = 0.4
MIN_AREA, MAX_AREA = 0.002, 0.8  # of the image, by mask area
NMS_IOU = 0.7


def grid_boxes(input_size: tuple[int, int], count: int) -> Tensor:
    """A fixed set of boxes: one over nearly the whole image, then 2 × 2, 3 × 3, ... cells, each shrunk by a tenth.

    Args:
        input_size: ``(h, w)`` of the image in the input frame.
        count: Boxes wanted.

    Returns:
        ``(count, 4)`` float32 XYXY in pixels of the input frame.
    """
    height, width = input_size
    boxes: list[list[float]] = []
    side = 0
    while len(boxes) < count:
        side += 1
        for row in range(side):
            for column in range(side):
                x, y = (column + 0.05) / side, (row + 0.05) / side
                boxes.append([x * width, y * height, (x + 0.9 / side) * width, (y + 0.9 / side) * height])
    return torch.tensor(boxes[:count], dtype=torch.float32).reshape(-1, 4)


@torch.no_grad()
def propose_boxes(model: PreTrainedModel, pixel_values: Tensor, input_size: tuple[int, int], count: int) -> Tensor:
    """Tight boxes of the masks that the model itself is most certain of, as SAM's automatic mask generator finds them.

    Args:
        model: The float model.
        pixel_values: ``(1, 3, S, S)``.
        input_size: ``(h, w)`` of the image before padding.
        count: Boxes wanted.

    Returns:
        ``(P, 4)`` float32 XYXY in pixels of the input frame on the CPU, best first, P ≤ ``count``.
    """
    height, width = input_size
    embeddings = encode_image(model, pixel_values)
    grid = (point_grid(POINTS_PER_SIDE).float() * torch.tensor([width, height]))[:, None]

    masks, scores = [], []
    for points in grid.split(POINTS_PER_BATCH):
        labels = torch.ones(points.shape[:2], dtype=torch.int)
        low_res, iou = predict_logits(model, embeddings, points=points, labels=labels, multimask_output=True)
        low_res, iou = low_res.flatten(0, 1), iou.flatten()
        cell = pixel_values.shape[-1] / low_res.shape[-1]
        # Logits over the padding mean nothing.
        low_res = low_res[:, : max(1, round(height / cell)), : max(1, round(width / cell))]
        stability = stability_score(low_res)
        area = (low_res > 0).float().mean((-1, -2))
        good = (iou >= MIN_PREDICTED_IOU) & (stability >= MIN_STABILITY) & (area >= MIN_AREA) & (area <= MAX_AREA)
        masks.append(low_res[good])
        scores.append((iou * stability)[good])
    found, score = torch.cat(masks), torch.cat(scores)
    kept = non_maximum_suppression(mask_boxes(found > 0), score, NMS_IOU)[:count]
    if not len(kept):
        return torch.zeros(0, 4)
    # Only the chosen few are worth the finer boxes.
    fine = F.interpolate(found[kept][:, None], scale_factor=cell, mode="bilinear", align_corners=False)[:, 0]
    limit = torch.tensor([width, height, width, height], dtype=torch.float32)
    return torch.minimum(mask_boxes(fine > 0).cpu(), limit)


def point_grid(side: int) -> Tensor:
    """Centres of ``side`` × ``side`` cells, row by row: ``(side², 2)`` float64 as (x, y), on 0..1."""
    margin = 1 / (2 * side)
    steps = torch.from_numpy(np.linspace(margin, 1 - margin, side))
    return torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).reshape(-1, 2)


def stability_score(logits: Tensor, offset: float = 1.0, threshold: float = 0.0) -> Tensor:
    """IoU between the masks cut ``offset`` above and below the threshold, ``(..., h, w)`` to ``(...)``."""
    inner = (logits > threshold + offset).sum((-1, -2)).float()
    outer = (logits > threshold - offset).sum((-1, -2)).float()
    return inner / outer.clamp(min=1)


def mask_boxes(masks: Tensor) -> Tensor:
    """Tight boxes of non-empty masks ``(N, h, w)``: ``(N, 4)`` float32 XYXY in pixels, right and bottom exclusive."""
    height, width = masks.shape[-2:]
    rows, columns = masks.any(-1).int(), masks.any(-2).int()
    top, left = rows.argmax(-1), columns.argmax(-1)
    bottom, right = height - rows.flip(-1).argmax(-1), width - columns.flip(-1).argmax(-1)
    return torch.stack([left, top, right, bottom], dim=-1).float()


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes ``(N, 4)`` and ``(M, 4)`` XYXY: ``(N, M)``."""
    corner = torch.maximum(a[:, None, :2], b[None, :, :2])
    size = (torch.minimum(a[:, None, 2:], b[None, :, 2:]) - corner).clamp(min=0)
    shared = size.prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b))
    return shared / (area_a[:, None] + area_b[None] - shared).clamp(min=1e-9)


def non_maximum_suppression(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Greedy suppression: indices of kept boxes, best first; equal scores in the order given.

    Args:
        boxes: ``(N, 4)`` XYXY.
        scores: ``(N,)``.
        threshold: Boxes that overlap a better one by more than this IoU go.
    """
    order = scores.argsort(descending=True, stable=True)
    kept: list[Tensor] = []
    # One row of overlaps at a time: a table of all pairs has N² entries.
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        order = order[box_iou(boxes[best][None], boxes[order])[0] <= threshold]
    return torch.stack(kept) if kept else order
