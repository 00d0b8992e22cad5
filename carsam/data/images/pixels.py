"""Pixels of any depth and mode as 8-bit RGB."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from carsam.data.images.file import open_image
from carsam.data.notes import Notes
from carsam.errors import DataError

# Depths of cameras and scanners whose values are stored in 16 bits.
DEPTHS = (8, 10, 12, 14, 16)
_TIFF_BITS, _TIFF_MAXIMA = 258, (281, 341)
# Below this high byte, fewer than 15 of the 16 bits are used.
_DARK = 63
# Pixels copied at once.
STRIP = 4_000_000

Turn = Callable[[Image.Image], Image.Image]


def to_rgb(image: Image.Image, path: Path, notes: Notes, turn: Turn | None = None) -> np.ndarray:
    """An opened image as ``(H, W, 3)`` uint8 RGB.

    Args:
        image: Opened, perhaps not decoded yet.
        path: Its file.
        notes: Receives how values of fewer than 16 bits were scaled.
        turn: Turns the image upright.

    Raises:
        DataError: The values have no fixed range.
    """
    wide_color = image.mode in ("RGB", "RGBA") and any(";16" in str(tile[3]) for tile in image.tile)
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        grey, bits = _wide_grey(turn(image) if turn else image, path, _stated_bits(image, path))
        if bits < 16:
            notes.add(_remark(bits), path.name)
        return np.repeat(grey[..., None], 3, axis=2)
    if wide_color and max(high for _, high in image.getextrema()[:3]) <= _DARK:
        image, bits = _dark_color(image, path)
        notes.add(_remark(bits), path.name)
    if turn is not None:
        image = turn(image)
    if "transparency" in image.info or image.mode[-1] in "aA":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return _array(image if image.mode == "RGB" else image.convert("RGB"))


def _array(image: Image.Image) -> np.ndarray:
    """RGB pixels ``(H, W, 3)`` in strips: Pillow's way to an array holds a large image three times more."""
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    rows = max(1, STRIP // max(1, image.width))
    for top in range(0, image.height, rows):
        pixels[top : top + rows] = image.crop((0, top, image.width, min(top + rows, image.height)))
    return pixels


def _remark(bits: int) -> str:
    return f"use {bits} of 16 bits and were scaled by {2**bits - 1}"


def _depth(largest: int, stated: int | None) -> int:
    """The depth of values up to ``largest``; what the file states counts unless they exceed it."""
    if stated is not None and stated < 16 and largest < 2**stated:
        return max(8, stated)
    return next(bits for bits in DEPTHS if largest < 2**bits)


def _wide_grey(image: Image.Image, path: Path, stated: int | None) -> tuple[np.ndarray, int]:
    """Grey pixels ``(H, W)`` uint8, and the bits that they used."""
    # Pillow opens 16-bit grey as "I;16*", or as 32-bit "I" in some formats and versions; its own conversion clips.
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise DataError(
            f"{path} holds {image.mode!r} pixels without a fixed range (floating point, signed or 32-bit); save it "
            "with 8 or 16 bits a channel, scaled to the range that matters."
        )
    bits = _depth(int(values.max()), stated)
    return _scaled(values, bits), bits


def _scaled(values: np.ndarray, bits: int) -> np.ndarray:
    largest = 2**bits - 1
    return ((values.astype(np.uint32) * 255 + largest // 2) // largest).astype(np.uint8)


def _dark_color(image: Image.Image, path: Path) -> tuple[Image.Image, int]:
    """An image that uses few of 16 bits a channel: Pillow kept the high bytes only, which are nearly black."""
    high = np.asarray(image.convert("RGB")).astype(np.uint16)
    with open_image(path) as again:
        # The other byte order gives the low bytes.
        swapped = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
        again.tile = [tile._replace(args=_swap(tile.args, swapped)) for tile in again.tile]
        try:
            low = np.asarray(again.convert("RGB"))
        except ValueError as error:
            raise DataError(
                f"{path} has 16 bits a channel but uses few of them, in a form of which Pillow reads the high bits "
                "only; save it with 8 bits a channel, scaled to its range."
            ) from error
    values = (high << 8) | low
    bits = _depth(int(values.max()), _stated_bits(image, path))
    color = Image.fromarray(_scaled(values, bits))
    if image.mode == "RGBA":
        color.putalpha(image.getchannel("A"))
    color.info = dict(image.info)
    return color, bits


def _swap(args: object, swapped: dict[str, str]) -> object:
    if isinstance(args, str):
        head, mark, order = args.partition(";16")
        return head + mark + swapped.get(order, order)
    return tuple(_swap(a, swapped) if isinstance(a, str) and ";16" in a else a for a in args)


def _stated_bits(image: Image.Image, path: Path) -> int | None:
    """Significant bits that a file states; None where it says nothing."""
    if image.format == "PNG":
        return _png_significant_bits(path)
    tags = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None:
        return None
    stated = _numbers(tags.get(_TIFF_BITS))
    stated += [number.bit_length() for tag in _TIFF_MAXIMA for number in _numbers(tags.get(tag))]
    return min((bits for bits in stated if bits > 0), default=None)


def _numbers(value: object) -> list[int]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [int(v) for v in values if isinstance(v, (int, float)) and 0 < v < 2**32]


def _png_significant_bits(path: Path) -> int | None:
    """The sBIT chunk, which stands before the pixels."""
    with path.open("rb") as file:
        file.seek(8)
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"sBIT":
                return max(file.read(min(length, 4)), default=None)
            if kind in (b"IDAT", b"IEND"):
                return None
            file.seek(length + 4, 1)
    return None
