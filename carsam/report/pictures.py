"""Pictures inside the page: as data URIs, smaller where all of them together would be too large."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, features

# (WebP quality, longest side in pixels), from the best on. The last makes a picture a few kilobytes.
LEVELS = ((90, 1200), (80, 900), (75, 640), (70, 480), (60, 320), (45, 200))
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
    """

    def __init__(self, folder: Path):
        self._folder = folder.resolve()
        self._pictures: dict[Path, Picture] = {}
        self._encoded: dict[tuple[Path, int], str] = {}

    def get(self, name: Any) -> Picture | None:
        """The picture with this name; None where there is none that can be read."""
        if not isinstance(name, str) or not name:
            return None
        path = (self._folder / name).resolve()
        if not path.is_relative_to(self._folder):
            return None
        if path not in self._pictures:
            try:
                with Image.open(path) as image:
                    image.load()
                    self._pictures[path] = Picture(path, image.size)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                return None
        return self._pictures[path]

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
            self._encoded[path, level] = _data_uri(path, *LEVELS[level])
        return self._encoded[path, level]


def _data_uri(path: Path, quality: int, side: int) -> str:
    """The file as it is where that is smaller than what would be made of it."""
    with Image.open(path) as image:
        kind, fits = image.format, max(image.size) <= side
        smaller = image.convert("RGB")
    smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    made = "WEBP" if features.check("webp") else "JPEG"
    smaller.save(buffer, made, quality=quality)
    data, original = buffer.getvalue(), path.read_bytes()
    if fits and kind in _MEDIA_TYPES and len(original) <= len(data):
        made, data = str(kind), original
    return f"data:{_MEDIA_TYPES[made]};base64,{base64.b64encode(data).decode()}"
