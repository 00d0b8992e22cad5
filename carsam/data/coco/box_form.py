"""Boxes of another form than COCO's x, y, width, height: an object's own mask tells, or the image's border."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from carsam.data.boxes import xywh_to_xyxy
from carsam.errors import DataError

# A box contradicts its mask if they overlap less, and an edge is farther away than a small object's blur.
MIN_IOU, MIN_DISTANCE = 0.5, 4.0
# A form explains a box that then overlaps the mask this much.
SAME_IOU = 0.75
# Outside the image by more than this share of it: rounding and loose annotation stay below.
OUTSIDE = 0.1
# So many boxes are needed to conclude from the borders alone that they are XYXY, or of images of another size.
MIN_BOXES = (4, 10)

logger = logging.getLogger(__name__)

# A form: from four numbers (N, 4) and image sizes (N, 2) as (w, h), to XYXY in pixels.
Form = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _xyxy(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return boxes


def _centre(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    half = boxes[:, 2:] / 2
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1)


def _xywh(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return xywh_to_xyxy(boxes)


def _yxhw(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return xywh_to_xyxy(boxes[:, [1, 0, 3, 2]])


def _yxyx(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return boxes[:, [1, 0, 3, 2]]


def _normalised(form: Form, whole: float = 1.0) -> Form:
    return lambda boxes, sizes: form(boxes, sizes) * np.tile(sizes, 2) / whole


_WIDTH = "width = x2 - x1, height = y2 - y1"
_FORMS: dict[str, tuple[Form, str]] = {
    "x1, y1, x2, y2": (_xyxy, _WIDTH),
    "centre x, centre y, width, height": (_centre, "x = centre x - width / 2, y = centre y - height / 2"),
    "x, y, width, height as shares of the image (0 to 1)": (
        _normalised(_xywh),
        "x and width times the image's width, y and height times its height",
    ),
    "x1, y1, x2, y2 as shares of the image (0 to 1)": (
        _normalised(_xyxy),
        f"x times the image's width, y times its height, then {_WIDTH}",
    ),
    "centre x, centre y, width, height as shares of the image (0 to 1), as YOLO has them": (
        _normalised(_centre),
        "x = (centre x - width / 2) times the image's width, width times it; the same with y and height",
    ),
    "x, y, width, height in percent of the image": (
        _normalised(_xywh, 100),
        "x and width times the image's width, y and height times its height, all divided by 100",
    ),
    "x1, y1, x2, y2 as thousandths of the image": (
        _normalised(_xyxy, 1000),
        f"x times the image's width, y times its height, all divided by 1000, then {_WIDTH}",
    ),
    "y1, x1, y2, x2 as thousandths of the image": (
        _normalised(_yxyx, 1000),
        f"swap x with y, then x times the image's width, y times its height, all divided by 1000, then {_WIDTH}",
    ),
    "y, x, height, width": (_yxhw, "swap x with y, and width with height"),
    "y1, x1, y2, x2": (_yxyx, f"swap x with y, then {_WIDTH}"),
}


@dataclass(frozen=True)
class BoxSample:
    """A box with what it is checked against.

    Attributes:
        name: How to call it in a message.
        bbox: Four numbers, as the file has them.
        size: ``(h, w)`` of the image.
        mask_box: Tight box of the object's mask, XYXY; None where there is no mask.
    """

    name: str
    bbox: tuple[float, float, float, float]
    size: tuple[int, int]
    mask_box: np.ndarray | None = None


def check_boxes(samples: Sequence[BoxSample], source: str) -> None:
    """Compares boxes with their objects' masks and with their images.

    Boxes without width or height are left to the caller.

    Args:
        samples: The boxes.
        source: The file, for messages.

    Raises:
        DataError: Most boxes contradict their masks, or most lie outside their images; says which form explains them.
            A few that do are counted in a logged warning.
    """
    samples = [sample for sample in samples if sample.bbox[2] != 0 and sample.bbox[3] != 0]
    with_mask, rest = [], []
    for sample in samples:
        has_mask = sample.mask_box is not None and (sample.mask_box[2:] > sample.mask_box[:2]).all()
        (with_mask if has_mask else rest).append(sample)
    wrong = _check_masks(with_mask, source)
    _check_borders([*rest, *(sample for sample, bad in zip(with_mask, wrong) if not bad)], source)


def _check_masks(samples: Sequence[BoxSample], source: str) -> np.ndarray:
    """Which boxes ``(N,)`` contradict their masks."""
    if not samples:
        return np.zeros(0, dtype=bool)
    boxes, sizes = _arrays(samples)
    masks = np.stack([sample.mask_box for sample in samples])
    own = _clipped(_xywh(boxes, sizes), sizes)
    wrong = (_iou(own, masks) < MIN_IOU) & (np.abs(own - masks).max(axis=1) > MIN_DISTANCE)
    if not wrong.any():
        return wrong
    counted = (
        f"{wrong.sum()} of {len(samples)} boxes in {source} contradict the mask of their object "
        f"(first: {samples[int(wrong.argmax())].name})"
    )
    form, explained = _best_form(boxes[wrong], sizes[wrong], masks[wrong])
    looks = f"; {explained} look like {form}, but COCO needs x, y, width, height in pixels: {_FORMS[form][1]}"
    clear, most = explained >= 0.8 * wrong.sum(), wrong.sum() > len(samples) / 2
    if most and clear:
        raise DataError(f"{counted}{looks}.")
    if most and len(samples) >= MIN_BOXES[0]:
        raise DataError(
            f"{counted}; do boxes and masks belong to the same images, at the same size? COCO needs x, y, width, "
            "height in pixels."
        )
    logger.warning("%s%s.", counted, looks if clear else "; the masks decide the score, the boxes are the prompts")
    return wrong


def _best_form(boxes: np.ndarray, sizes: np.ndarray, masks: np.ndarray) -> tuple[str, int]:
    explains = Counter(
        {
            name: int((_iou(_clipped(form(boxes, sizes), sizes), masks) >= SAME_IOU).sum())
            for name, (form, _) in _FORMS.items()
        }
    )
    return explains.most_common(1)[0]


def _check_borders(samples: Sequence[BoxSample], source: str) -> None:
    if not samples:
        return
    boxes, sizes = _arrays(samples)
    if len(samples) > 1 and boxes.max() <= 1.5 and boxes.min() >= 0 and boxes[:, 2:].max() <= 1:
        name = "x, y, width, height as shares of the image (0 to 1)"
        raise DataError(
            f"all {len(samples)} boxes in {source} look like {name}, but COCO needs pixels: {_FORMS[name][1]}."
        )
    outside = _outside(_xywh(boxes, sizes), sizes)
    if not outside.any():
        return
    first = samples[int(outside.argmax())]
    counted = (
        f"{outside.sum()} of {len(samples)} boxes in {source} reach far outside their image (first: {first.name}, "
        f"bbox {[round(v, 2) for v in first.bbox]}, image {first.size[1]} × {first.size[0]})"
    )
    turned = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & ~_outside(boxes, sizes)
    most = outside.sum() > len(samples) / 2
    if most and turned.all() and len(samples) >= MIN_BOXES[0]:
        raise DataError(f"{counted}; they look like x1, y1, x2, y2, but COCO needs x, y, width, height: {_WIDTH}.")
    if not most or len(samples) < MIN_BOXES[1]:
        logger.warning("%s; they are cut off at its border.", counted)
    else:
        raise DataError(f"{counted}; were they made for images of another size?")


def _arrays(samples: Sequence[BoxSample]) -> tuple[np.ndarray, np.ndarray]:
    boxes = np.array([sample.bbox for sample in samples], dtype=np.float64)
    return boxes, np.array([sample.size[::-1] for sample in samples], dtype=np.float64)


def _outside(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    room = np.maximum(OUTSIDE * sizes, MIN_DISTANCE)
    return (boxes[:, :2] < -room).any(axis=1) | (boxes[:, 2:] > sizes + room).any(axis=1)


def _clipped(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return boxes.clip(0, np.tile(sizes, 2))


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    def area(boxes: np.ndarray) -> np.ndarray:
        return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1)

    common = area(np.concatenate([np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])], axis=1))
    return common / np.maximum(area(a) + area(b) - common, 1e-9)
