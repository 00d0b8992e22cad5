"""A table of what a quantization gives and what it costs: scores, their share of the float model's, seconds."""

from __future__ import annotations

import statistics
from typing import Any

from evidence_tables import Chosen, Group, Result, difference, reference_of, sections

from carsam.run.comparison_table import mean_and_spread


def seconds_of(found: dict[str, Any]) -> float:
    """Seconds of a quantization, with those of units that it found finished by another row.

    Args:
        found: The content of a row's file.
    """
    kept = found["quantization"]
    return kept["seconds"] + sum(unit["seconds"] for unit in kept["units"] if unit.get("from_another_row"))


def share(group: Group, floating: Group | None, name: str) -> str:
    """A score in per cent of the float model's, the mean over seeds."""
    if floating is None:
        return ""
    (whole,) = floating.values(name)
    return f"{100 * statistics.fmean(group.values(name)) / whole:.1f} %"


def _device(result: Result) -> str:
    made = result.found["made"]
    return f"{made['device']}, {made['threads']} threads" if made["device"] == made["processor"] else made["device"]


def costs_table(chosen: Chosen, reference: str) -> str:
    """Scores, their share of the float model's, and seconds of the quantization."""

    def table(floating: Group | None, lines: tuple[Group, ...]) -> list[list[str]]:
        head = ["bits", "row", "seeds", "segm AP", "of float", "mean IoU", "of float", f"IoU to {reference}"]
        rows = [[*head, "seconds", "on"]]
        for group in lines:
            seconds = statistics.fmean(seconds_of(result.found) for result in group.results)
            cells = [group.bits.upper(), group.label, str(len(group.results))]
            for name in ("segm_ap", "mean_iou"):
                cells += [mean_and_spread(group.values(name)), share(group, floating, name)]
            devices = dict.fromkeys(_device(result) for result in group.results)
            other = difference(group, reference_of(lines, group, reference))
            rows.append([*cells, other, f"{seconds:.0f}", " and ".join(devices)])
        return rows

    return sections(
        chosen,
        table,
        "Seconds of the quantization, from the model in memory to a checked folder, beside other work of the machine. "
        "Differences of mean IoU with 95 % intervals over images; bold where 0 is outside.",
        "quantization",
    )


KINDS = {"costs": costs_table}
