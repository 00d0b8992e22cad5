"""The sections of the report, in the order of the page: one module and one template each."""

from __future__ import annotations

from carsam.report.pictures import Pictures
from carsam.report.sections import (
    accuracy,
    attention,
    commands,
    examples,
    network,
    oscillation,
    ranges,
    recipe,
    sensitivity,
    size,
    units,
)
from carsam.report.sections.base import Section
from carsam.report.source import Source


def all_sections(source: Source, pictures: Pictures) -> list[Section]:
    """Every section, also those with nothing to show."""
    return [
        size.section(source),
        accuracy.section(source),
        examples.section(source, pictures),
        attention.section(source, pictures),
        oscillation.section(source),
        units.section(source),
        network.section(source),
        ranges.section(source),
        sensitivity.section(source),
        recipe.section(source),
        commands.section(source),
    ]
