"""A run whose folder is in its place already: killed at its very end, or given a second time with ``--resume``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from carsam.config import QuantizeConfig
from carsam.errors import CarsamError
from carsam.methods.base import Method
from carsam.reading import read_json, read_yaml
from carsam.reconstruct.store import mac_report, unit_report
from carsam.reconstruct.walk import WalkReport

RESULTS, _RECIPE = "results.json", "recipe.yaml"
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError)


def differing_settings(folder: Path, config: QuantizeConfig, method: Method) -> list[str]:
    """Names of the settings in which a packed folder's recipe differs from a run's."""
    recipe = read_recipe(folder)
    calibration = recipe.get("calibration")
    calibration = calibration if isinstance(calibration, dict) else {}
    here: dict[str, Any] = {
        "method": config.method,
        "bits": config.bits,
        "bits for sites": config.overrides,
        "settings": method.to_dict(),
    }
    there = {
        "method": recipe.get("method"),
        "bits": recipe.get("bits"),
        "bits for sites": recipe.get("overrides"),
        "settings": recipe.get("settings"),
    }
    for name in ("n_images", "boxes_per_image", "box_source", "seed"):
        here[name], there[name] = getattr(config.calibration, name), calibration.get(name)
    return [name for name in here if _plain(here[name]) != _plain(there[name])]


def read_recipe(folder: Path) -> dict[str, Any]:
    """A packed folder's recipe; empty where it cannot be read."""
    try:
        recipe = read_yaml(folder / _RECIPE, "")
    except (CarsamError, OSError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def read_quantization(folder: Path) -> dict[str, Any] | None:
    """The quantization's part of ``results.json``; None where it is not there or not readable."""
    try:
        results = read_json(folder / RESULTS, "")
    except (CarsamError, OSError):
        return None
    found = results.get("quantization") if isinstance(results, dict) else None
    return found if isinstance(found, dict) else None


def finished_report(quantization: dict[str, Any]) -> WalkReport:
    """Reports of units and compensations from ``results.json``; empty where they are not readable."""
    try:
        return WalkReport(
            [unit_report(values) for values in quantization["units"]],
            [mac_report(values) for values in quantization["compensations"]],
            list(quantization["transforms"]),
        )
    except _DAMAGE:
        return WalkReport()


def _plain(value: Any) -> Any:
    """Tuples as lists, as files give them back."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
