"""Names of output files: no two alike, none that a file system refuses."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from carsam.errors import CarsamError
from carsam.predict.inputs import Photo

_PATTERNS = {
    "png": re.compile(r"(.+)_mask_\d+(?:_\d+)?\.png", re.DOTALL),
    "overlay": re.compile(r"(.+)_overlay\.png", re.DOTALL),
    "npz": re.compile(r"(.+)\.npz", re.DOTALL),
}
# Bytes that file systems allow in a name, less what is added here (_mask_12345_3.png) and while it is written.
_LONGEST = 255 - 32 - 20


def output_stems(photos: Sequence[Photo]) -> list[Path]:
    """What the names of every photo's outputs start with, relative to the output folder.

    That is the photo's name without suffix; with suffix where two differ in nothing else (``a.png`` and ``a.jpg``),
    and with a hash of its path where that does not help either. Names that differ only in case or in Unicode
    composition count as the same, since some file systems take them for one. Long names are shortened, with a hash.
    """
    forms: tuple[Callable[[Photo], str], ...] = (
        lambda photo: photo.path.stem,
        lambda photo: photo.path.name,
        lambda photo: f"{photo.path.name}-{_hash(str(photo.path.resolve()))}",
    )
    chosen = [0] * len(photos)
    while True:
        stems = [photo.subfolder / _shortened(forms[form](photo)) for photo, form in zip(photos, chosen)]
        count = Counter(map(_folded, stems))
        alike = [i for i, stem in enumerate(stems) if count[_folded(stem)] > 1 and chosen[i] + 1 < len(forms)]
        if not alike:
            return stems
        # Only the ones still on the lowest form move on: "a.png.jpg" must not push "a.png" and "a.jpg" further.
        lowest = min(chosen[i] for i in alike)
        for i in alike:
            chosen[i] += chosen[i] == lowest


def earlier_outputs(folder: Path, stems: Sequence[Path], formats: Collection[str]) -> dict[Path, list[Path]]:
    """Files of earlier predictions that new ones could take for theirs, by stem.

    Args:
        folder: The output folder.
        stems: From :func:`output_stems`.
        formats: What will be written.
    """
    found: dict[Path, list[Path]] = {}
    wanted = set(stems)
    for place in {stem.parent for stem in stems}:
        if not (folder / place).is_dir():
            continue
        for file in sorted((folder / place).iterdir()):
            for format, pattern in _PATTERNS.items():
                match = pattern.fullmatch(file.name)
                if format in formats and match and place / match[1] in wanted:
                    found.setdefault(place / match[1], []).append(file)
    return found


def check_not_inputs(outputs: Sequence[Path], photos: Sequence[Photo]) -> None:
    """Refuses outputs that would take the place of an input image.

    Raises:
        CarsamError: One would.
    """
    inputs = {photo.path.resolve() for photo in photos}
    for output in outputs:
        if output.resolve() in inputs:
            raise CarsamError(f"{output} is an input and would be overwritten; choose another folder with --out.")


def _folded(stem: Path) -> str:
    return unicodedata.normalize("NFC", str(stem)).casefold()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _shortened(name: str) -> str:
    raw = name.encode("utf-8", "surrogateescape")
    if len(raw) <= _LONGEST:
        return name
    # A character that the cut splits is left out.
    return f"{raw[: _LONGEST - 9].decode('utf-8', 'ignore')}-{_hash(name)}"
