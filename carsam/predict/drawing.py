"""The picture of an image with its masks and prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from carsam.evaluate.overlay import color_of, draw_box, overlay
from carsam.predict.masks import FoundMask
from carsam.predict.prompts import Prompt

# Overlays are for the eye: those of larger photos are drawn smaller.
MAX_PIXELS = 2**24
_INSIDE, _OUTSIDE = (40, 200, 70), (230, 40, 40)


def small_copy(image: np.ndarray) -> np.ndarray:
    """The image, or a smaller one of at most ``MAX_PIXELS``."""
    size = _drawn_size(image.shape[:2])
    if size == image.shape[:2]:
        return image
    return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BOX))


def draw(image: np.ndarray, size: tuple[int, int], masks: Sequence[FoundMask], prompts: Sequence[Prompt]) -> np.ndarray:
    """Tints the best mask of every prompt, and draws the boxes and points.

    Points are green with a plus inside the object, red with a minus outside.

    Args:
        image: From :func:`small_copy`.
        size: ``(h, w)`` of the image itself.
        masks: At that size.
        prompts: In pixels of that size; the n-th has the n-th colour.

    Returns:
        ``(h, w, 3)`` uint8 RGB.
    """
    height, width = image.shape[:2]
    picture = image
    # Large objects first: a small one inside a large one stays visible.
    for mask in sorted((mask for mask in masks if mask.best), key=lambda mask: -mask.area):
        pixels = mask.pixels
        if pixels.shape != (height, width):
            pixels = np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST))
        picture = overlay(picture, pixels, color_of(mask.number - 1))
    scale = (width / size[1], height / size[0])
    canvas = Image.fromarray(picture)
    pen = ImageDraw.Draw(canvas)
    for number, prompt in enumerate(prompts):
        if prompt.box is not None:
            box = [value * factor for value, factor in zip(prompt.box, scale * 2)]
            draw_box(pen, box, color_of(number), max(2, round(max(height, width) / 250)))
    radius = max(4, round(max(height, width) / 100))
    for x, y, label in (point for prompt in prompts for point in prompt.points):
        _draw_point(pen, x * scale[0], y * scale[1], radius, label)
    return np.array(canvas)


def _draw_point(pen: ImageDraw.ImageDraw, x: float, y: float, radius: int, label: int) -> None:
    color, line = (_INSIDE if label else _OUTSIDE), max(1, radius // 3)
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline=(255, 255, 255), width=line)
    arm = radius / 2
    pen.line((x - arm, y, x + arm, y), fill=(255, 255, 255), width=line)
    if label:
        pen.line((x, y - arm, x, y + arm), fill=(255, 255, 255), width=line)


def _drawn_size(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    factor = min(1.0, (MAX_PIXELS / (height * width)) ** 0.5)
    return max(1, int(height * factor)), max(1, int(width * factor))
