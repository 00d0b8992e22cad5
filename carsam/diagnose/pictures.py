"""Small pictures for the report: heat maps of attention over an image, and masks on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image
from torch import Tensor

from carsam.data.images.transforms import Geometry
from carsam.evaluate.overlay import color_of, overlay

HEAT_SIDE, MASK_SIDE, ZOOM_SIDE = 384, 512, 320
# A zoom shows an object with as much around it again, and at least so many pixels of the image file.
_ZOOM_ROOM, _LEAST_REGION = 2.0, 32
# Photographs: a tenth of the size of PNG, and no artefact that a reader would take for attention.
SUFFIX, QUALITY = ".jpg", 88
# Share of the colour over the grey image.
HEAT_OPACITY = 0.65
_BOX_COLOR = (255, 255, 255)

# Viridis (matplotlib, CC0) at nine even steps: even in lightness, and readable with colour blindness.
_VIRIDIS = np.array(
    [
        *((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141)),
        *((39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37)),
    ],
    dtype=np.float64,
)


def viridis(values: np.ndarray) -> np.ndarray:
    """Colours of values: (...) in 0..1 (others are cut) → (..., 3) float64 RGB in 0..255."""
    places = np.clip(values, 0, 1) * (len(_VIRIDIS) - 1)
    steps = np.arange(len(_VIRIDIS))
    return np.stack([np.interp(places, steps, _VIRIDIS[:, channel]) for channel in range(3)], axis=-1)


def shrink(image: np.ndarray, longest_side: int) -> tuple[np.ndarray, float]:
    """The image (H, W, 3) uint8 with its longest side at most ``longest_side`` pixels, and the factor."""
    height, width = image.shape[:2]
    factor = min(1.0, longest_side / max(height, width))
    if factor == 1:
        return image, factor
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)), factor


def heat_picture(
    image: np.ndarray, attention: Tensor, peak: float, geometry: Geometry, image_size: int, box: Sequence[float]
) -> Image.Image:
    """Attention over an image, in colours of viridis on its grey values, with the box prompt.

    Args:
        image: (H, W, 3) uint8 RGB.
        attention: (keys,) attention of one token, over the square grid that covers the padded input frame.
        peak: Attention that gets the last colour.
        geometry: How the image lies in the input frame.
        image_size: Side of the input frame in pixels.
        box: XYXY in pixels of the image.
    """
    small, factor = shrink(image, HEAT_SIDE)
    side = round(attention.numel() ** 0.5)
    onto = replace(geometry, original_size=small.shape[:2])
    heat = onto.masks_to_original(attention.reshape(1, side, side).float().cpu(), image_size)[0].numpy()
    grey = small.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    picture = HEAT_OPACITY * viridis(heat / max(peak, 1e-30)) + (1 - HEAT_OPACITY) * grey[..., None]
    nothing = np.zeros(small.shape[:2], dtype=bool)
    drawn = overlay(picture.round().astype(np.uint8), nothing, _BOX_COLOR, [float(v) * factor for v in box])
    return Image.fromarray(drawn)


def mask_picture(image: np.ndarray, masks: Sequence[np.ndarray], boxes: np.ndarray) -> Image.Image:
    """Masks on an image, each in the colour of its box.

    Args:
        image: (H, W, 3) uint8 RGB.
        masks: (H, W) bool each.
        boxes: (N, 4) XYXY in pixels of the image, one a mask.
    """
    small, factor = shrink(image, MASK_SIDE)
    size = (small.shape[1], small.shape[0])
    # Large objects first: a small one inside a large one stays visible.
    for index in sorted(range(len(masks)), key=lambda i: -int(masks[i].sum())):
        soft = Image.fromarray(masks[index].astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
        small = overlay(small, np.asarray(soft) >= 128, color_of(index), [float(v) * factor for v in boxes[index]])
    return Image.fromarray(small)


def zoom_region(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The square around a box that a zoom shows, moved into the image; all of a side that is shorter.

    Args:
        box: XYXY in pixels of the image.
        size: ``(h, w)`` of the image.

    Returns:
        XYXY in whole pixels.
    """
    x0, y0, x1, y1 = map(float, box)
    side = max(round(_ZOOM_ROOM * max(x1 - x0, y1 - y0)), _LEAST_REGION)
    ends = []
    for low, high, length in ((x0, x1, size[1]), (y0, y1, size[0])):
        start = min(max(0, round((low + high - side) / 2)), max(0, length - side))
        ends.append((start, min(start + side, length)))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


def zoom_picture(
    image: np.ndarray, mask: np.ndarray, box: Sequence[float], region: tuple[int, int, int, int], index: int
) -> Image.Image:
    """One mask on its part of an image, enlarged.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) bool.
        box: XYXY in pixels of the image.
        region: From :func:`zoom_region`.
        index: Number of the object, for its colour.
    """
    left, top, right, bottom = region
    factor = ZOOM_SIDE / max(right - left, bottom - top)
    size = (max(1, round((right - left) * factor)), max(1, round((bottom - top) * factor)))
    part = Image.fromarray(image[top:bottom, left:right]).resize(size, Image.Resampling.LANCZOS)
    soft = Image.fromarray(mask[top:bottom, left:right].astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    moved = [(float(v) - start) * factor for v, start in zip(box, (left, top, left, top))]
    return Image.fromarray(overlay(np.array(part), np.asarray(soft) >= 128, color_of(index), moved))
