"""Pictures that show masks on their image, and the float model's beside the quantized one's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]

# Twelve colours that stay apart from each other on photographs.
PALETTE: tuple[Color, ...] = (
    (255, 64, 64),
    (40, 170, 255),
    (255, 200, 20),
    (60, 210, 90),
    (230, 80, 230),
    (255, 130, 30),
    (30, 220, 210),
    (150, 110, 255),
    (190, 230, 40),
    (255, 120, 170),
    (70, 110, 255),
    (200, 140, 90),
)
OPACITY = 0.45
MAX_WIDTH = 1500
_GAP = 12
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


def color_of(index: int) -> Color:
    """Colour of the object with this index."""
    return PALETTE[index % len(PALETTE)]


def overlay(
    image: np.ndarray, mask: np.ndarray, color: Color, box: Sequence[float] | None = None, *, opacity: float = OPACITY
) -> np.ndarray:
    """Tints a mask, draws its contour, and the box prompt.

    Args:
        image: ``(H, W, 3)`` uint8 RGB; not changed.
        mask: ``(H, W)`` bool.
        color: RGB, 0..255.
        box: XYXY in pixels.
        opacity: Of the tint, 0..1.

    Returns:
        ``(H, W, 3)`` uint8 RGB.

    Raises:
        ValueError: The mask has another size than the image.
    """
    mask = np.asarray(mask, dtype=bool)
    if mask.shape != image.shape[:2]:
        raise ValueError(f"the mask is {mask.shape}, the image {image.shape[:2]}; resize the mask first.")
    width = max(1, round(max(mask.shape) / 250))
    picture = image.astype(np.float32)
    tint = np.array(color, dtype=np.float32)
    picture[mask] = (1 - opacity) * picture[mask] + opacity * tint
    picture = picture.round().astype(np.uint8)
    # A light line around the coloured one keeps the contour visible on a ground of the same colour.
    picture[_grow(mask, width) & ~mask] = 255
    picture[mask & _grow(~mask, width)] = color
    if box is not None:
        canvas = Image.fromarray(picture)
        draw_box(ImageDraw.Draw(canvas), box, color, width)
        picture = np.array(canvas)
    return picture


def comparison(
    image: np.ndarray,
    panels: Sequence[tuple[str, np.ndarray | Sequence[np.ndarray], float | None]],
    boxes: Sequence[Sequence[float]] | np.ndarray | None = None,
    *,
    max_width: int = MAX_WIDTH,
) -> Image.Image:
    """The image, and beside it one panel a model.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        panels: (title, mask or masks, IoU): a mask ``(H, W)`` or one for each object ``(N, H, W)``, bool; the IoU
            (0..1, a mean for several) is written beside the title, None leaves it out.
        boxes: Box prompts ``(N, 4)`` XYXY in pixels, drawn on all panels; the n-th has the n-th mask's colour.
        max_width: Of the picture in pixels; the panels are shrunk to fit.

    Raises:
        ValueError: A mask has another size than the image.
    """
    boxes = [] if boxes is None else [list(map(float, box)) for box in np.asarray(boxes).reshape(-1, 4)]
    height, width = image.shape[:2]
    columns = len(panels) + 1
    scale = min((max_width - _GAP * (columns + 1)) / columns / width, max_width / height)
    size = (max(1, round(width * min(scale, 2))), max(1, round(height * min(scale, 2))))
    factor = (size[0] / width, size[1] / height) * 2

    # Drawn at the final size, so that lines and contours stay sharp.
    small = np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    scaled = [[v * f for v, f in zip(box, factor)] for box in boxes]
    drawn = [("image", _draw(small, [], scaled), None)]
    for title, masks, iou in panels:
        stack = np.asarray(masks, dtype=bool).reshape(-1, *np.shape(masks)[-2:])
        if stack.shape[1:] != image.shape[:2]:
            raise ValueError(f"the mask of {title!r} is {stack.shape[1:]}, the image {image.shape[:2]}.")
        drawn.append((title, _draw(small, [_resize_mask(m, size) for m in stack], scaled), iou))
    return _lay_out(drawn, size)


def _draw(image: np.ndarray, masks: Sequence[np.ndarray], boxes: Sequence[Sequence[float]]) -> np.ndarray:
    # Large objects first: a small one inside a large one stays visible.
    for i in sorted(range(len(masks)), key=lambda i: -int(masks[i].sum())):
        image = overlay(image, masks[i], color_of(i))
    canvas = Image.fromarray(image)
    for i, box in enumerate(boxes):
        draw_box(ImageDraw.Draw(canvas), box, color_of(i), max(2, round(max(image.shape[:2]) / 250)))
    return np.array(canvas)


def _resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    soft = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(soft) >= 128


def _lay_out(panels: Sequence[tuple[str, np.ndarray, float | None]], size: tuple[int, int]) -> Image.Image:
    width, height = size
    text_size = max(11, min(22, width // 18))
    font, header = ImageFont.load_default(text_size), round(text_size * 1.6)
    sheet = Image.new("RGB", (_GAP + len(panels) * (width + _GAP), header + height + 2 * _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (title, picture, iou) in enumerate(panels):
        left = _GAP + i * (width + _GAP)
        score = "" if iou is None else f"IoU {100 * iou:.1f} %"
        room = width - draw.textlength(score, font=font) - text_size
        middle = _GAP // 2 + header // 2
        draw.text((left, middle), _shorten(draw, title, font, room), fill=_INK, font=font, anchor="lm")
        draw.text((left + width, middle), score, fill=_INK, font=font, anchor="rm")
        sheet.paste(Image.fromarray(picture), (left, _GAP + header))
    return sheet


def _shorten(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont, room: float) -> str:
    if draw.textlength(text, font=font) <= room:
        return text
    while text and draw.textlength(text + "…", font=font) > room:
        text = text[:-1]
    return text + "…"


def _grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Dilation by a diamond, inside the array only."""
    from scipy import ndimage  # takes a while to import; not every command draws

    return ndimage.binary_dilation(mask, iterations=pixels)


def draw_box(draw: ImageDraw.ImageDraw, box: Sequence[float], color: Color, width: int) -> None:
    """Dashed: a solid box reads like the contour of a mask."""
    x0, y0, x1, y1 = (float(v) for v in box)
    dash = 4.0 * width + 4
    for (ax, ay), (bx, by) in (((x0, y0), (x1, y0)), ((x1, y0), (x1, y1)), ((x1, y1), (x0, y1)), ((x0, y1), (x0, y0))):
        length = abs(bx - ax) + abs(by - ay)
        for start in np.arange(0, length, 1.6 * dash):
            a, b = start / length, min(start + dash, length) / length
            ends = [(ax + t * (bx - ax), ay + t * (by - ay)) for t in (a, b)]
            draw.line(ends, fill=color, width=width)
