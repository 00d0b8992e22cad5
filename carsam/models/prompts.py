"""Prompts that do not fit are refused, in the same words whatever computes their masks."""

from __future__ import annotations

import torch
from torch import Tensor


def check_prompts(
    side: int, points: Tensor | None, labels: Tensor | None, boxes: Tensor | None, masks: Tensor | None
) -> None:
    """Refuses prompts that do not fit each other or the model, and numbers that mean nothing.

    Args:
        side: Of the model's mask inputs, in pixels.
        points, labels, boxes, masks: As :func:`predict_logits` takes them.

    Raises:
        ValueError: With the fix.
    """
    named = (("points", points), ("labels", labels), ("boxes", boxes), ("mask inputs", masks))
    for name, prompt in named:
        if prompt is not None and (not isinstance(prompt, Tensor) or prompt.is_complex()):
            what = prompt.dtype if isinstance(prompt, Tensor) else type(prompt).__name__
            raise ValueError(f"{name} must be a real tensor, not {what}; SamPredictor.predict takes arrays and lists.")
    if (points is None) != (labels is None):
        raise ValueError("point coordinates and point labels must be given together.")
    if points is not None and (points.ndim != 3 or points.shape[2] != 2 or labels.shape != points.shape[:2]):
        raise ValueError(
            f"points must be (B, N, 2) with labels (B, N), not {tuple(points.shape)} with {tuple(labels.shape)}."
        )
    if boxes is not None and (boxes.ndim not in (2, 3) or boxes.shape[-1] != 4 or boxes.shape[1:-1].numel() != 1):
        raise ValueError(f"boxes must be (B, 4) XYXY, one box a prompt, not {tuple(boxes.shape)}.")
    if masks is not None and (masks.ndim != 4 or tuple(masks.shape[1:]) != (1, side, side)):
        raise ValueError(f"mask inputs must be (B, 1, {side}, {side}) logits, not {tuple(masks.shape)}.")
    counts = {prompt.shape[0] for prompt in (points, boxes) if prompt is not None}
    if len(counts) > 1:
        raise ValueError(f"as many boxes as point prompts are needed, not {boxes.shape[0]} and {points.shape[0]}.")
    n_masks = 1 if masks is None else masks.shape[0]
    count = counts.pop() if counts else n_masks
    if n_masks not in (1, count):
        raise ValueError(f"as many mask inputs as prompts (or one) are needed, not {n_masks} and {count}.")
    for name, prompt in named:
        if prompt is not None and not bool(torch.isfinite(prompt).all()):
            raise ValueError(f"{name} hold NaN or infinite numbers; give finite ones.")
    if labels is not None and not bool(((labels == 1) | (labels == 0) | (labels == -1)).all()):
        raise ValueError("point labels must be 1 (inside the object), 0 (outside) or -1 (no point).")
    if boxes is not None and bool((boxes[..., 2:] < boxes[..., :2]).any()):
        raise ValueError(
            "a box is upside down; boxes are x1, y1, x2, y2 with x1 <= x2 and y1 <= y2, not x, y, width, height."
        )
