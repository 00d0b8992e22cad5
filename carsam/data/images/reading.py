"""Reading images: every common file becomes 8-bit RGB, everything else a :class:`~carsam.errors.DataError`."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from carsam.data.images.file import (
    DECODING_ERRORS,
    ORIENTATION,
    image_suffixes,
    is_image,
    open_image,
    unreadable_suffix,
)
from carsam.data.images.pixels import to_rgb
from carsam.data.notes import Notes
from carsam.errors import DataError

# Files beside images that are not opened to see whether they are images.
_NO_IMAGES = frozenset(
    f".{suffix}"
    for suffix in (
        *("avi", "bin", "csv", "db", "gz", "h5", "hdf", "html", "ini", "json", "jsonl", "log", "md", "mov", "mp3"),
        *("mp4", "npy", "npz", "part", "pdf", "pkl", "pt", "pth", "py", "safetensors", "sh", "tar", "tgz", "tmp"),
        *("toml", "tsv", "txt", "xls", "xlsx", "xml", "yaml", "yml", "zip"),
    )
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SkippedImage:
    """An image that could not be used, and why."""

    path: Path
    reason: str


def read_image(path: str | Path, *, apply_exif: bool = True, notes: Notes | None = None) -> np.ndarray:
    """Reads an image file as 8-bit RGB.

    Grey, palette and CMYK images are converted. Transparency is composited on white, since the colour stored under
    transparent pixels is arbitrary. 16-bit values are scaled by the bits that the file holds (8, 10, 12, 14 or 16),
    not clipped. Of an animation, the first frame is read.

    Args:
        path: The file, of up to 300 megapixels.
        apply_exif: Turn the image upright as its EXIF orientation says.
        notes: Receives how 16-bit values with fewer used bits were scaled; without it, a warning is logged.

    Returns:
        ``(H, W, 3)`` uint8, RGB.

    Raises:
        DataError: The file is missing, is no image, is too large, is damaged or cut off, or holds values that have no
            fixed range (floating point, 32-bit).
    """
    path = Path(path)
    own = Notes() if notes is None else notes
    with open_image(path) as image:
        pixels = to_rgb(image, path, own, turn=_upright if apply_exif else None)
    if notes is None:
        for remark in own.names:
            logger.warning("%s: its pixels %s.", path, remark)
    return pixels


def _upright(image: Image.Image) -> Image.Image:
    try:
        # Pillow would copy an image that is upright already.
        return image if image.getexif().get(ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)
    except DECODING_ERRORS:
        # Damaged EXIF data; the pixels are whole.
        return image


def list_images(folder: str | Path) -> list[Path]:
    """The image files directly in a folder, sorted by name; hidden files are left out.

    These are the files with a suffix of a format that Pillow reads, and those with an unknown suffix or none that
    begin as such a format does. Photographs in a format that cannot be read are counted in a logged warning.

    Raises:
        DataError: The folder is missing, is no folder, or holds no image.
    """
    folder = Path(folder)
    if not folder.exists():
        raise DataError(f"there is no image folder {folder}.")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; give the folder that holds the images.")
    try:
        files = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
        files = [p for p in files if p.is_file()]
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror or error}.") from error
    known = image_suffixes()
    paths, left_out, fix = [], Counter(), ""
    for path in files:
        suffix = path.suffix.lower()
        if suffix in known or (suffix not in _NO_IMAGES and is_image(path)):
            paths.append(path)
        elif unreadable_suffix(suffix):
            left_out[suffix] += 1
            fix = fix or unreadable_suffix(suffix)
    counted = ", ".join(f"{count} {suffix}" for suffix, count in left_out.items())
    if not paths:
        common = ".bmp, .gif, .jfif, .jpeg, .jpg, .png, .tif, .tiff, .webp and what else Pillow reads"
        hint = f" It holds {counted}: {fix}." if counted else ""
        raise DataError(f"the folder {folder} holds no images; accepted are {common} (no subfolders).{hint}")
    if counted:
        logger.warning("files left out of %s: %s; %s.", folder, counted, fix)
    return paths


def log_skipped(skipped: list[SkippedImage], noun: str = "images") -> None:
    """Logs one warning about all skipped images: how many, and the first reasons."""
    if skipped:
        logger.warning("%d %s skipped: %s.", len(skipped), noun, _reasons(skipped))


def require_images(count: int, minimum: int, skipped: list[SkippedImage], where: str = "") -> None:
    """Refuses too few usable images.

    Args:
        count: Usable images.
        minimum: Images needed.
        skipped: The others.
        where: Source to name in the message.

    Raises:
        DataError: ``count`` is below ``minimum``; names how many were skipped and the first reasons.
    """
    if count >= minimum:
        return
    source = f" in {where}" if where else ""
    message = f"only {count} usable images{source}, at least {minimum} are needed; {len(skipped)} were skipped"
    raise DataError(f"{message} ({_reasons(skipped)})." if skipped else f"{message}. Add images.")


def _reasons(skipped: list[SkippedImage]) -> str:
    reasons = "; ".join(s.reason.rstrip(".") for s in skipped[:3])
    return reasons + (f"; and {len(skipped) - 3} more" if len(skipped) > 3 else "")
