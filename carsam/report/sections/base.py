"""What the sections have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from carsam.report.commands import diagnose_command
from carsam.report.numbers import finite
from carsam.report.source import Source

UNKNOWN = "not known"


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        id: Its anchor, and the name of its template.
        title: Its heading.
        view: What the template shows; None where there is nothing to show.
        missing: In its place, a sentence about what is not known.
        command: The command that would fill it in; empty where there is none.
        absent: The same in a word, for the table of contents.
    """

    id: str
    title: str
    view: dict[str, Any] | None
    missing: str = ""
    command: str = ""
    absent: str = UNKNOWN


def diagnosed(source: Source, id: str, title: str, view: dict[str, Any] | None, what: str) -> Section:
    """A section that the diagnosis fills.

    Args:
        source: The folder.
        id, title: Name and heading of the section.
        view: None where the diagnosis does not hold it.
        what: What it would hold, for the sentence in its place.
    """
    missing = f"The model has not been diagnosed, so {what} are not known."
    if source.diagnosis is not None:
        missing = f"The diagnosis in this folder holds no {what}; this command makes a new one."
    return Section(id, title, view, missing, diagnose_command(source))


def mean(values: list[float | None]) -> float | None:
    """The mean of the known values; None where there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def percent(share: Any) -> float | None:
    """A share 0..1 (an IoU of the diagnosis) in percent, as evaluations print it."""
    value = finite(share)
    return None if value is None else 100 * value
