"""Image files before their pixels: which there are, what their headers say, whether they are whole."""

from __future__ import annotations

import contextlib
import importlib
import os
import struct
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from carsam.data.coco.annotations import MAX_PIXELS
from carsam.errors import DataError

# What Pillow's decoders raise on damaged files; UnidentifiedImageError is an OSError.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
    Image.DecompressionBombError,
)

# Formats of which Pillow knows the suffix but has no pixels, or that need another program.
_NO_PIXELS = frozenset((".bufr", ".eps", ".emf", ".grib", ".h5", ".hdf", ".iim", ".mpeg", ".mpg", ".ps", ".wmf"))
_CONVERT = "convert them to JPEG or PNG"
_HEIF = "install pillow-heif (`pip install pillow-heif`), or convert them to JPEG"
_UNREADABLE = {
    **dict.fromkeys((".heic", ".heif", ".hif"), _HEIF),
    **dict.fromkeys(
        (".avif", ".jp2", ".jxl", ".svg", ".dcm", ".nii", ".psb", ".exr", ".hdr", ".pdf", ".eps"), _CONVERT
    ),
    **dict.fromkeys((".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"), _CONVERT),
}
# What a file is, by its first bytes, if Pillow does not know it.
_SIGNATURES = (
    (0, b"%PDF", "a PDF file"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<?xml", "an XML file or SVG drawing"),
    (0, b"<", "a web page, perhaps from a failed download"),
    (0, b"version https://git-lfs", "a git-lfs pointer; run `git lfs pull`"),
    (0, b"\xff\x0a", "a JPEG XL image; convert it to PNG"),
    (4, b"JXL ", "a JPEG XL image; convert it to PNG"),
    (128, b"DICM", "a DICOM file; export its frames as PNG"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
ORIENTATION = 0x0112
MAX_DECODED_PIXELS = 50_000_000
# Pillow's limit is one setting of the process.
_pillow_limit = threading.Lock()


@dataclass(frozen=True)
class Header:
    """What an image file says before its pixels are decoded.

    Attributes:
        size: ``(h, w)`` as stored.
        orientation: EXIF orientation 1..8; 1 where there is none.
        wide: Whether it has more than 8 bits a channel.
    """

    size: tuple[int, int]
    orientation: int
    wide: bool

    @property
    def upright_size(self) -> tuple[int, int]:
        """``(h, w)`` as viewers show the image."""
        return self.size if self.orientation < 5 else self.size[::-1]


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Opens an image file; its pixels are decoded when they are first used, inside the ``with`` block.

    Raises:
        DataError: The file is missing, is no image that can be read, is larger than 300 megapixels, or is damaged,
            also where that shows only while it is decoded.
    """
    _register_heif()
    # Not Path.exists, which raises for names that are too long.
    if not os.path.exists(path):
        raise DataError(f"there is no image {path}.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"cannot read the image {path}: it is no file.")
    try:
        with warnings.catch_warnings():
            # Pillow's remarks about odd metadata name no file and no fix.
            warnings.simplefilter("ignore")
            with _opened(path) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise DataError(
                        f"{path} has {width} × {height} pixels, {width * height / 1e6:.0f} megapixels; carsam reads up "
                        f"to {MAX_PIXELS // 10**6}. Make it smaller, or cut it into tiles."
                    )
                yield image
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"there is not enough memory to read {path}; make the image smaller.") from error
    except DECODING_ERRORS as error:
        raise DataError(
            f"cannot read the image {path}: {_what_it_is(path) or error or type(error).__name__}"
        ) from error


def _opened(path: Path) -> Image.Image:
    with _pillow_limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def read_header(path: Path) -> Header:
    """Reads size and orientation without decoding pixels.

    Raises:
        DataError: The file is missing, is no image, or is too large.
    """
    with open_image(path) as image:
        orientation = _orientation(image)
        wide = image.mode.startswith("I") or image.mode == "F" or any(";16" in str(tile[3]) for tile in image.tile)
        return Header((image.height, image.width), orientation, wide)


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and not image.info.keys() & {"exif", "Raw profile type exif", "xmp"}:
        # Pillow would decode the pixels, to look for EXIF data after them.
        return 1
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except DECODING_ERRORS:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def check_whole(path: Path, *, decode: bool) -> None:
    """Finds out whether an image file is complete.

    Args:
        path: The file.
        decode: Decode it (a JPEG at an eighth of its size), unless it has more than 50 megapixels; otherwise only its
            end is looked at.

    Raises:
        DataError: The file is damaged or cut off.
    """
    with open_image(path) as image:
        kind = image.format
        if decode and image.width * image.height <= MAX_DECODED_PIXELS:
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
            return
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(-min(file.tell(), 1 << 16), os.SEEK_END)
            end = file.read()
    except OSError as error:
        raise DataError(f"cannot read the image {path}: {error.strerror or error}") from error
    # A JPEG may hold a whole thumbnail before its own scan, which begins with FF DA.
    cut = kind == "JPEG" and end.rfind(b"\xff\xd9") <= end.rfind(b"\xff\xda")
    if cut or (kind == "PNG" and b"IEND" not in end):
        raise DataError(f"cannot read the image {path}: the file was cut off.")


def is_image(path: Path) -> bool:
    """Whether a file begins as an image does that Pillow reads."""
    try:
        with open_image(path) as image:
            return image.format not in (None, "EPS", "WMF", "HDF5", "BUFR", "GRIB", "MPEG", "PDF")
    except DataError:
        return False


@lru_cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the formats that Pillow can read here, in lower case with their dot."""
    _register_heif()
    Image.init()
    return frozenset(s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN) - _NO_PIXELS


def unreadable_suffix(suffix: str) -> str:
    """How to make images with this suffix readable; empty for files that are no images."""
    return "" if suffix in image_suffixes() else _UNREADABLE.get(suffix, "")


@lru_cache
def _register_heif() -> None:
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return


def _what_it_is(path: Path) -> str:
    """A file that is no image, by its first bytes; empty where they do not tell."""
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError:
        return ""
    if not start:
        return "the file is empty."
    if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS and ".heic" not in image_suffixes():
        return f"it is a HEIC photograph; {_HEIF}."
    if start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"avis") and ".avif" not in image_suffixes():
        return "it is an AVIF image, which this Pillow does not read; update Pillow, or convert it to PNG."
    for offset, signature, what in _SIGNATURES:
        if start[offset:].startswith(signature):
            return f"it is {what}."
    return ""
