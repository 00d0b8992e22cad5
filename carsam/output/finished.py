"""A run whose folder is in its place already: killed at its very end, or given a second time with ``--resume``."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath
from typing import Any

from carsam.config import QuantizeConfig
from carsam.errors import CarsamError
from carsam.methods.base import Method
from carsam.pack.folder import RECIPE, RESULTS
from carsam.reading import read_json, read_yaml
from carsam.run.store import compensation_report, unit_report
from carsam.run.walk import WalkReport

_DAMAGE = (KeyError, TypeError, ValueError, AttributeError)


def differing_settings(folder: Path, config: QuantizeConfig, method: Method, model: str = "") -> list[str]:
    """Names of the settings in which a packed folder's recipe differs from a run's.

    Args:
        folder: The packed folder.
        config, method: Of the run.
        model: What the run quantizes; empty for a model in memory, which has no name to compare.
    """
    recipe = read_recipe(folder)
    calibration = recipe.get("calibration")
    calibration = calibration if isinstance(calibration, dict) else {}
    here: dict[str, Any] = {
        "method": config.method,
        "bits": config.bits,
        "bits for sites": config.overrides,
        "budget": config.budget,
        "decoder only": config.decoder_only,
        "settings": method.to_dict(),
        "normalise": config.normalise,
        "image size": config.image_size,
    }
    there = {
        "method": recipe.get("method"),
        "bits": recipe.get("bits"),
        "bits for sites": recipe.get("overrides"),
        "budget": recipe.get("budget"),
        "decoder only": recipe.get("decoder_only", False),
        "settings": recipe.get("settings"),
        "normalise": recipe.get("normalise"),
        "image size": recipe.get("image_size"),
    }
    for name in ("n_images", "boxes_per_image", "box_source", "seed"):
        here[name], there[name] = getattr(config.calibration, name), calibration.get(name)
    # Recipes hold no places of a machine, so only the last part of a path can be compared.
    here |= {"images": _last(config.calibration.images), "COCO file": _last(config.calibration.coco)}
    there |= {"images": _last(calibration.get("images")), "COCO file": _last(calibration.get("coco"))}
    if model and recipe.get("model"):
        here["model"], there["model"] = _last(model), _last(recipe["model"])
    return [name for name in here if _plain(here[name]) != _plain(there[name])]


def read_recipe(folder: Path) -> dict[str, Any]:
    """A packed folder's recipe; empty where it cannot be read."""
    try:
        recipe = read_yaml(folder / RECIPE, "")
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
            [compensation_report(values) for values in quantization["compensations"]],
            list(quantization["transforms"]),
        )
    except _DAMAGE:
        return WalkReport()


def _last(path: Any) -> str:
    """The last part of a path, on whichever system it was written; empty for none."""
    return PureWindowsPath(str(path or "")).name


def _plain(value: Any) -> Any:
    """Tuples as lists, as files give them back."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
