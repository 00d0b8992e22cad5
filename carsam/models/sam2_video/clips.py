"""Clips for calibration: what a model's memory sees when it follows an object, and still images that move.

Where there are no videos, a still image becomes one: the camera pans, turns and zooms along a smooth path while the
picture bends a little. The first frame is the image itself, so its boxes show the objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carsam.models.sam2_video.tracking import Sam2Tracker
from carsam.models.tracking import Tracked

# Objects followed in a clip, the largest first.
OBJECTS = 2


def moving_still(image: Tensor, seed: int, frames: int) -> Tensor:
    """A clip of a still image, the same for the same image and seed.

    Args:
        image: (1, 3, S, S), preprocessed.
        seed: Of the path.
        frames: How many.

    Returns:
        (frames, 3, S, S); the first one is the image.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 2 * torch.rand(shape, generator=generator) - 1

    # Over the whole clip: up to a fifth of the side, 12 degrees, a fifth larger or smaller, 2 % of bending.
    shift, turn, zoom = 0.4 * draw(2), math.radians(12) * draw(1), 0.2 * draw(1)
    bend = 0.04 * draw(1, 2, 4, 4)
    sway = math.pi * draw(3)  # nothing moves along a straight line
    side = image.shape[-1]
    bend = F.interpolate(bend, (side, side), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    found = [image[0].float().cpu()]
    for index in range(1, frames):
        along = index / (frames - 1)
        eased = along * (1 + 0.3 * math.sin(sway[0] + 2 * math.pi * along) - 0.3 * math.sin(sway[0]))
        angle, scale = float(turn) * eased, 1 + float(zoom) * eased
        cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
        affine = torch.tensor([[cosine, -sine, float(shift[0]) * eased], [sine, cosine, float(shift[1]) * eased]])
        grid = F.affine_grid(affine[None], [1, 3, side, side], align_corners=False) + bend * math.sin(math.pi * eased)
        frame = F.grid_sample(found[0][None], grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        found.append(frame[0])
    return torch.stack(found)


def follow(
    model: nn.Module,
    frames: Tensor,
    boxes: Tensor | None = None,
    masks: Tensor | None = None,
    objects: int = OBJECTS,
) -> list[dict[int, Tracked]]:
    """Follows objects through a clip, as prediction does, from the first frame on.

    Args:
        model: The model, in whatever state of quantization it is.
        frames: (T, 3, S, S), preprocessed.
        boxes: (N, 4) XYXY in pixels of the input frame, where there are no masks.
        masks: (N, S, S), 1 inside; they come before boxes.
        objects: How many are followed, the largest first.

    Returns:
        What is found on each frame.
    """
    tracker = Sam2Tracker(model, frames.to(model.device))
    if masks is not None:
        order = masks.flatten(1).sum(1).argsort(descending=True, stable=True)[:objects].tolist()
        for index in order:
            tracker.prompt_mask(index, 0, masks[index])
    else:
        sides = boxes[:, 2:] - boxes[:, :2]
        order = sides.prod(1).argsort(descending=True, stable=True)[:objects].tolist()
        for index in order:
            tracker.prompt_points(index, 0, boxes[index].view(2, 2), torch.tensor([2, 3]))
    return [tracker.step(index) for index in range(len(frames))]


Call = tuple[tuple[Any, ...], dict[str, Any]]


def calls_of(modules: Sequence[nn.Module], run: Callable[[], object]) -> list[list[Call]]:
    """Arguments of every call of some modules while ``run()`` runs."""
    seen: list[list[Call]] = [[] for _ in modules]
    with torch.no_grad(), _listening(modules, seen):
        run()
    return seen


@contextmanager
def _listening(modules: Sequence[nn.Module], seen: list[list[Call]]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(
            lambda _module, args, kwargs, kept=kept: kept.append((args, kwargs)), with_kwargs=True
        )
        for module, kept in zip(modules, seen)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
