"""Tables of what happens inside: errors of units, where time goes, what MAC changed, dissipation and oscillation."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from evidence_tables import Chosen, Group, sections

from carsam.run.comparison_table import mean_and_spread


def units_table(chosen: Chosen, reference: str) -> str:
    """Relative squared errors of units before and after their reconstruction."""

    def table(floating: Group | None, lines: tuple[Group, ...]) -> list[list[str]]:
        rows = [["bits", "row", "unit", "steps", "before", "after"]]
        for group in lines:
            of_seeds = [result.found["quantization"]["units"] for result in group.results]
            for units in zip(*of_seeds):
                ends = [_errors([unit[when] for unit in units]) for when in ("before", "after")]
                rows.append([group.bits.upper(), group.label, units[0]["unit"], str(units[0]["steps"]), *ends])
        return rows

    return sections(chosen, table, "Of each output of a unit, mean over seeds.")


def _errors(of_seeds: list[list[float]]) -> str:
    return ", ".join(f"{statistics.fmean(values):.3f}" for values in zip(*of_seeds))


def time_table(chosen: Chosen, reference: str) -> str:
    """Where the time of a row went."""

    def table(floating: Group | None, lines: tuple[Group, ...]) -> list[list[str]]:
        names = list(
            dict.fromkeys(name for group in lines for name in group.results[0].found["quantization"]["stages"])
        )
        rows = [["bits", "row", *names, "boxes", "all"]]
        for group in lines:
            stages = [
                statistics.median(result.found["quantization"]["stages"].get(name, 0.0) for result in group.results)
                for name in names
            ]
            ends = [
                statistics.median(result.found["seconds"][name] for result in group.results)
                for name in ("boxes", "all")
            ]
            rows.append([group.bits.upper(), group.label, *(f"{seconds:.1f} s" for seconds in (*stages, *ends))])
        return rows

    return sections(chosen, table, "Median over seeds.")


def compensation_table(chosen: Chosen, reference: str) -> str:
    """What MAC did to every attention: relative squared errors of its scores and of its output before and after."""

    def table(floating: Group | None, lines: tuple[Group, ...]) -> list[list[str]]:
        rows = [["attention", "bits", "row", "error of QKᵀ", "error of PV", "‖D‖/‖W‖"]]
        changed = [group for group in lines if all(r.found["quantization"]["compensations"] for r in group.results)]
        names = (
            [each["attention"] for each in changed[0].results[0].found["quantization"]["compensations"]]
            if changed
            else []
        )
        for at, name in enumerate(names):
            for group in changed:
                found = [result.found["quantization"]["compensations"][at] for result in group.results]
                ends = [
                    " → ".join(_errors([each[what] for each in found]).split(", ")) for what in ("scores", "output")
                ]
                sizes = [statistics.fmean(each["change"][branch] for each in found) for branch in found[0]["change"]]
                sizes = ", ".join(f"{branch} {size:.2f}" for branch, size in zip(found[0]["change"], sizes))
                rows.append([short(name), group.bits.upper(), group.label, *ends, sizes])
        return rows

    return sections(
        chosen,
        table,
        "On the calibration images, everything quantized, nearest rounding, before anything is learned; row means of "
        "QKᵀ removed. Mean over seeds.",
    )


def dissipation_table(chosen: Chosen, reference: str) -> str:
    """Entropy, KL and focus of every decoder attention, float against quantized."""

    def table(floating: Group | None, lines: tuple[Group, ...]) -> list[list[str]]:
        rows = [
            [
                "attention",
                "bits",
                "row",
                "entropy, float",
                "change",
                "KL",
                "focus overlap",
                "least of a head",
                "dead rows",
            ]
        ]
        names = [each["name"] for each in lines[0].results[0].found["diagnosis"]["attentions"]]
        for at, name in enumerate(names):
            for group in lines:
                found = [result.found["diagnosis"]["attentions"][at] for result in group.results]
                means = {key: statistics.fmean(each[key] for each in found) for key in _MEASURES}
                least = min(map(statistics.fmean, zip(*(each["heads"]["focus_overlap"] for each in found))))
                rows.append(
                    [
                        short(name),
                        group.bits.upper(),
                        group.label,
                        f"{means['entropy_float']:.2f}",
                        f"{means['entropy_change']:+.2f}",
                        f"{means['kl']:.3f}",
                        f"{means['focus_overlap']:.2f}",
                        f"{least:.2f}",
                        f"{means['dead_rows']:.0%}",
                    ]
                )
        return rows

    return sections(
        chosen,
        table,
        "Nats; focus overlap is the IoU of the keys above half of a row's maximum. Mean over seeds.",
        "diagnosis",
    )


_MEASURES = ("entropy_float", "entropy_change", "kl", "focus_overlap", "dead_rows")


def oscillation_table(chosen: Chosen, reference: str) -> str:
    """Relative error along the decoder, in execution order, and its total variation in log scale."""

    def table(floating: Group | None, lines: tuple[Group, ...]) -> list[list[str]]:
        stages = lines[0].results[0].found["diagnosis"]["oscillation"]["stages"]
        rows = [["bits", "row", *map(short, stages), "total variation"]]
        for group in lines:
            courses = [result.found["diagnosis"]["oscillation"] for result in group.results]
            errors = [statistics.fmean(values) for values in zip(*(course["errors"] for course in courses))]
            variation = mean_and_spread([course["total_variation"] for course in courses])
            rows.append([group.bits.upper(), group.label, *(f"{error:.3f}" for error in errors), variation])
        return rows

    return sections(
        chosen,
        table,
        "Relative squared error of each stage's output in the finished model, mean over seeds.",
        "diagnosis",
    )


def short(name: str) -> str:
    """The last words of a module's path, with its block."""
    return ".".join(name.split(".")[-3:])


KINDS: dict[str, Callable[[Chosen, str], str]] = {
    "units": units_table,
    "time": time_table,
    "compensation": compensation_table,
    "dissipation": dissipation_table,
    "oscillation": oscillation_table,
}
