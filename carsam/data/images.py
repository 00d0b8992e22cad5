"""Reading images: every common file becomes 8-bit RGB, everything else a :class:`~carsam.errors.DataError`."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from carsam.errors import DataError

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

# What Pillow's decoders raise on damaged files; UnidentifiedImageError is an OSError.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    struct.error,
    Image.DecompressionBombError,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SkippedImage:
    """An image that could not be used, and why."""

    path: Path
    reason: str


def read_image(path: str | Path, *, apply_exif: bool = True) -> np.ndarray:
    """Reads an image file as 8-bit RGB.

    Grey, palette and CMYK images are converted. Transparency is composited on white, since the colour stored under
    transparent pixels is arbitrary. 16-bit values are scaled (65535 becomes 255), not clipped. Of an animation, the
    first frame is read.

    Args:
        path: The file.
        apply_exif: Turn the image upright as its EXIF orientation says.

    Returns:
        ``(H, W, 3)`` uint8, RGB.

    Raises:
        DataError: The file is missing, is no image, is damaged or cut off, or holds values that have no fixed range
            (floating point, 32-bit).
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"there is no image {path}.")
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(_upright(image) if apply_exif else image, path)
    except DataError:
        raise
    except _DECODING_ERRORS as error:
        raise DataError(f"cannot read the image {path}: {error or type(error).__name__}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _DECODING_ERRORS:
        # Damaged EXIF data; the pixels are whole.
        return image


def _to_rgb(image: Image.Image, path: Path) -> np.ndarray:
    if image.mode == "F" or image.mode.startswith("I"):
        return np.repeat(_wide_grey_to_8_bit(image, path)[..., None], 3, axis=2)
    if "transparency" in image.info or image.mode[-1] in "aA":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.array(image.convert("RGB"))


def _wide_grey_to_8_bit(image: Image.Image, path: Path) -> np.ndarray:
    # Pillow opens 16-bit grey as "I;16*", or as 32-bit "I" in some formats and versions; its own conversion clips.
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise DataError(
            f"{path} holds {image.mode!r} pixels without a fixed range; save it with 8 or 16 bits a channel."
        )
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def list_images(folder: str | Path) -> list[Path]:
    """The image files directly in a folder, sorted by name; hidden files are left out.

    Raises:
        DataError: The folder is missing, is no folder, or holds no image.
    """
    folder = Path(folder)
    if not folder.exists():
        raise DataError(f"there is no image folder {folder}.")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; give the folder that holds the images.")
    paths = [p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".")]
    paths = sorted((p for p in paths if p.is_file()), key=lambda p: p.name)
    if not paths:
        raise DataError(f"the folder {folder} holds no images; accepted are {', '.join(EXTENSIONS)} (no subfolders).")
    return paths


def read_images(
    paths: Iterable[str | Path], *, minimum: int = 1, skipped: list[SkippedImage] | None = None
) -> Iterator[tuple[Path, np.ndarray]]:
    """Reads images one at a time and skips unreadable files with a logged warning.

    Args:
        paths: Image files.
        minimum: Images that must be readable.
        skipped: Receives what was skipped.

    Yields:
        The path and ``(H, W, 3)`` uint8 RGB.

    Raises:
        DataError: Fewer than ``minimum`` images are readable; raised after the last file, with the reasons.
    """
    skipped = [] if skipped is None else skipped
    before, count = len(skipped), 0
    for path in map(Path, paths):
        try:
            image = read_image(path)
        except DataError as error:
            logger.warning("skipped: %s", error)
            skipped.append(SkippedImage(path, str(error)))
            continue
        count += 1
        yield path, image
    require_images(count, minimum, skipped[before:])


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
    reasons = "; ".join(s.reason for s in skipped[:3])
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    raise DataError(f"{message} ({reasons}{more})." if skipped else f"{message}. Add images.")
