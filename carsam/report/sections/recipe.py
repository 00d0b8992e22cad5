"""The recipe: everything that decided the result."""

from __future__ import annotations

from carsam.report.order import mapping
from carsam.report.sections.base import Section
from carsam.report.source import Source


def section(source: Source) -> Section:
    """The section."""
    if source.recipe_text is None:
        return Section("recipe", "Recipe", None, "The folder holds no recipe.yaml, so its settings are not known.")
    view = {
        "text": source.recipe_text.rstrip(),
        "calibration": mapping(source.recipe.get("calibration")),
        "overrides": mapping(source.recipe.get("overrides")),
    }
    return Section("recipe", "Recipe", view)
