"""Masks of a video's objects as PNG files, as DAVIS keeps them: the number of the palette's colour is the object's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from carsam.data.images.file import open_image
from carsam.errors import DataError

# What DAVIS and other sets write where nobody could tell; it belongs to no object.
VOID = 255
# A grey mask with more values than this is a photograph, or a mask with smooth borders.
_MAX_OBJECTS = 64


def palette() -> list[int]:
    """DAVIS's colours, which are PASCAL VOC's: 256 times red, green, blue, in 0..255."""
    index = np.arange(256)
    colours = np.zeros((256, 3), int)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return colours.ravel().tolist()


def read_mask(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Reads which object each pixel belongs to.

    A PNG with a palette holds the object's number, 0 for the background. One without a palette is read so too, except
    that a mask of nothing but 0 and 255 (or of one bit) is a single object, number 1, as DAVIS 2016 has it. 255 beside
    other numbers is no object.

    Args:
        path: The file.
        size: ``(h, w)`` that it must have.

    Returns:
        ``(h, w)`` uint8.

    Raises:
        DataError: The file is missing or damaged, has another size, or is a picture in colours or with smooth borders.
    """
    mask, mode = _read(path, size)
    values = np.unique(mask)
    if mode != "P":
        if set(values.tolist()) <= {0, VOID}:
            return (mask > 0).astype(np.uint8)
        if len(values) > _MAX_OBJECTS:
            raise DataError(
                f"the mask {path} has no palette and {len(values)} different grey values, more than objects can be; "
                "is it a photograph, or are its borders smooth? Save it with 0 outside and 1, 2, … inside the objects."
            )
    mask[mask == VOID] = 0
    return mask


def read_single_mask(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Reads a mask of one object, as SA-V has it: ``(h, w)`` bool, all that is not 0.

    Raises:
        DataError: As :func:`read_mask`; or it holds several objects.
    """
    mask, _ = _read(path, size)
    values = np.unique(mask)
    if len(values[values > 0]) > 1:
        raise DataError(f"the mask {path} holds several objects; in this folder form each object has its own file.")
    return mask > 0


def write_mask(path: Path, numbers: np.ndarray) -> None:
    """Writes which object each pixel belongs to as a PNG with DAVIS's palette.

    Args:
        path: The file; its folder exists.
        numbers: ``(h, w)``, 0 for the background, below 255.

    Raises:
        ValueError: A number has no colour.
        OSError: The disk is full, or the place is not writable.
    """
    if numbers.size and (numbers.min() < 0 or numbers.max() >= VOID):
        raise ValueError(f"numbers of objects must be 1 to {VOID - 1}, not {numbers.max()}.")
    image = Image.fromarray(np.ascontiguousarray(numbers, dtype=np.uint8))
    image.putpalette(palette())
    image.save(path, format="PNG")


def _read(path: Path, size: tuple[int, int] | None) -> tuple[np.ndarray, str]:
    """A mask's values as they are stored, uint8, and Pillow's mode of the file."""
    with open_image(path) as image:  # what is damaged shows while it is decoded, still inside the block
        mode = image.mode
        if mode not in ("P", "L", "1"):
            raise DataError(
                f"the mask {path} is a picture in colours ({mode}) without a palette, so its objects have no numbers; "
                "save it as a PNG with a palette, or in grey with 0 outside and 1, 2, … inside the objects."
            )
        mask = np.array(image.convert("L") if mode == "1" else image, dtype=np.uint8)
    if size is not None and mask.shape != size:
        raise DataError(
            f"the mask {path} has {mask.shape[1]} × {mask.shape[0]} pixels, its frame {size[1]} × {size[0]}; "
            "they must be equal."
        )
    return mask, mode
