"""Where on this machine the calibration images of a recipe lie.

A packed folder holds no path of the machine that made it, so its ``recipe.yaml`` names the images' folder only. The
user's cache remembers the rest by the fingerprint of the images: ``--recipe`` finds them again on the same machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from carsam.errors import CarsamError
from carsam.output.files import write_json
from carsam.output.user_cache import cache_folder
from carsam.pack.folder import portable
from carsam.reading import read_json

_KEYS = ("images", "coco")
_MOST_BYTES = 2**16


def remember(recipe: Mapping[str, Any]) -> None:
    """Notes the paths of a recipe's calibration that its saved form leaves out; without a place to note, nothing."""
    path, calibration = _note_path(recipe), recipe.get("calibration")
    if path is None or not isinstance(calibration, Mapping):
        return
    places = {key: str(calibration[key]) for key in _KEYS if calibration.get(key)}
    if portable(places) == places:
        return
    try:
        write_json(path, places)
    except CarsamError:
        return  # a cache that cannot be written costs one flag later


def recalled(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Paths of a saved recipe's calibration that exist here: ``images`` and ``coco``, as far as they are known."""
    path = _note_path(recipe)
    try:
        places = read_json(path, "remove it", most=_MOST_BYTES) if path is not None and path.is_file() else {}
    except CarsamError:
        return {}
    return {key: places[key] for key in _KEYS if isinstance(places.get(key), str) and Path(places[key]).exists()}


def _note_path(recipe: Mapping[str, Any]) -> Path | None:
    fingerprint = recipe.get("calibration_fingerprint")
    if not isinstance(fingerprint, str) or not fingerprint.isalnum() or len(fingerprint) > 128:
        return None
    return cache_folder() / "calibrations" / f"{fingerprint}.json"
