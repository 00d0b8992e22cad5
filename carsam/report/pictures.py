"""Pictures inside the page: as data URIs, smaller where all of them together would be too large."""

from __future__ import annotations

import base64
import io
import stat
import struct
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError, features

from carsam.errors import DataError

# (WebP quality, longest side in pixels), from the best on. The last makes a picture a few kilobytes.
LEVELS = ((90, 1200), (80, 900), (75, 640), (70, 480), (60, 320), (45, 200))
# What carsam diagnose draws has at most 512 pixels a side and 200 kB.
MAX_BYTES = 8 * 2**20
MAX_PIXELS = 2048 * 2048
# A progressive JPEG decodes every scan over all of its pixels; real ones have about ten.
_MAX_SCANS = 100
_MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


@dataclass
class Picture:
    """A picture of the page.

    Attributes:
        path: Its file.
        size: Width and height in pixels.
        uri: Set by :meth:`Pictures.encode`; empty where the page had no room for it.
    """

    path: Path
    size: tuple[int, int]
    uri: str = field(default="", repr=False)

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]


class Pictures:
    """The pictures of a page.

    Args:
        folder: What their names are relative to; nothing outside it is read.

    Attributes:
        refused: Names of pictures that are there but cannot be shown, with the reason.
    """

    def __init__(self, folder: Path):
        self._folder = folder.resolve()
        self._pictures: dict[Path, Picture] = {}
        self._encoded: dict[tuple[Path, int], str] = {}
        self.refused: dict[str, str] = {}

    def get(self, name: Any) -> Picture | None:
        """The picture with this name; None where there is none that can be shown."""
        if not isinstance(name, str) or not name or name in self.refused:
            return None
        try:
            path = (self._folder / name).resolve()
            if not path.is_relative_to(self._folder):
                raise ValueError("it lies outside the folder of the diagnosis")
            if path not in self._pictures:
                self._pictures[path] = Picture(path, _checked_size(path))
            return self._pictures[path]
        except FileNotFoundError:
            return None
        except (*_DAMAGES, RuntimeError) as error:  # RuntimeError: links in a circle
            self.refused[name] = _reason(error)
            return None

    def encode(self, budget: int) -> int:
        """Fills in every picture's ``uri``, at the best level at which all of them fit.

        Args:
            budget: Characters for all of them. Where even the last level is too large, the last pictures stay without.

        Returns:
            Pictures left out.
        """
        for level in range(len(LEVELS)):
            if self._fits(level, budget):
                break
        left_out = 0
        for picture in self._pictures.values():
            uri = self._encode(picture.path, level)
            fits = len(uri) <= budget
            budget -= len(uri) if fits else 0
            left_out += not fits
            picture.uri = uri if fits else ""
        return left_out

    def _fits(self, level: int, budget: int) -> bool:
        for picture in self._pictures.values():
            budget -= len(self._encode(picture.path, level))
            if budget < 0:
                return False
        return True

    def _encode(self, path: Path, level: int) -> str:
        if (path, level) not in self._encoded:
            try:
                self._encoded[path, level] = _data_uri(path, *LEVELS[level])
            except _DAMAGES as error:
                raise DataError(f"{path} changed while the report was made ({error}); make it again.") from error
        return self._encoded[path, level]


# What Pillow raises for damaged files of the three formats.
_DAMAGES = (
    *(OSError, ValueError, SyntaxError, EOFError, OverflowError, TypeError, KeyError, IndexError, struct.error),
    Image.DecompressionBombError,
)


def _checked_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture that can be decoded; looked up in its header before anything is.

    Raises:
        One of ``_DAMAGES``: It cannot be, or it would take more time and memory than a picture of a diagnosis.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a file")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"it has {status.st_size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.1f} MB")
    data = path.read_bytes()
    with _opened(data) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"it claims {width} × {height} pixels, more than {MAX_PIXELS / 1e6:.1f} million")
        if image.format == "JPEG" and data.count(b"\xff\xda") > _MAX_SCANS:
            raise ValueError("it is a JPEG of too many scans")
        image.convert("RGB")
        return image.size


def _opened(data: bytes) -> Image.Image:
    """A picture of which only the header has been read. No WebP: Pillow makes room for its pixels as it opens it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no PNG or JPEG"
    if isinstance(error, Image.DecompressionBombError):
        return "it claims more pixels than a picture of a diagnosis has"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


def _data_uri(path: Path, quality: int, side: int) -> str:
    """The file as it is where that is smaller than what would be made of it."""
    original = path.read_bytes()
    with _opened(original) as image:
        kind, fits = image.format, max(image.size) <= side
        smaller = image.convert("RGB")
    smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    made = "WEBP" if features.check("webp") else "JPEG"
    smaller.save(buffer, made, quality=quality)
    data = buffer.getvalue()
    if fits and len(original) <= len(data):
        made, data = str(kind), original
    return f"data:{_MEDIA_TYPES[made]};base64,{base64.b64encode(data).decode()}"
