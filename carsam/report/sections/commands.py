"""Commands: everything that made the folder and this page, to do it again."""

from __future__ import annotations

from carsam.report.commands import (
    diagnose_command,
    evaluate_command,
    float_model,
    placeholders,
    quantize_command,
    quoted,
    report_command,
)
from carsam.report.sections.base import Section
from carsam.report.source import Source


def section(source: Source) -> Section:
    """The section."""
    commands = [
        (
            "Quantize",
            "The same model, images, recipe and version of carsam give the same file.",
            quantize_command(source),
        ),
        ("Evaluate", "Scores of the packed model; they are noted in its folder.", evaluate_command(source)),
        (
            "Evaluate the float model",
            "Its scores on the same data, to compare with.",
            f"{evaluate_command(source, float_model(source))} --json FLOAT.json",
        ),
        ("Diagnose", "Finds where the packed model departs from the float one.", diagnose_command(source)),
        ("Report", "Makes this page again.", report_command(source, float_scores=True)),
    ]
    view = {
        "commands": commands,
        "folder": quoted(source.name),
        "placeholders": placeholders([command for _, _, command in commands]),
    }
    return Section("commands", "Commands", view)
