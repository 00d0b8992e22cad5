"""Tables of evidence: rows of docs/results, means over seeds, differences with paired 95 % intervals over images."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence_rows import FLOAT, HELD_OUT, Row

from carsam.errors import ConfigError, DataError
from carsam.evaluate.intervals import Difference, averaged, difference_interval
from carsam.reading import read_json
from carsam.run.comparison_table import mean_and_spread

FIX = "delete it, and run the row again"
BITS = {FLOAT: 0, "w8a8": 1, "w6a6": 2, "w4a4": 3}


@dataclass(frozen=True)
class Result:
    """A row with what was found.

    Attributes:
        row: Its settings.
        found: The whole file.
        path: Where it was read.
    """

    row: Row
    found: dict[str, Any]
    path: Path


@dataclass(frozen=True)
class Group:
    """One line of a table: a label at one bit-width, over seeds."""

    label: str
    bits: str
    results: tuple[Result, ...]

    def values(self, name: str) -> list[float]:
        """A score of each seed."""
        return [result.found["scores"][name] for result in self.results]

    def per_image(self, score: str = "iou") -> list[dict[str, Any]]:
        """IoU (or DSC) of each prompt, the mean over seeds, image by image, in percent."""
        images = averaged([_scored(result.found["scores"]["per_image"], score) for result in self.results])
        return images

    def of_seeds(self, other: Group) -> Group:
        """The line without the seeds that another one lacks."""
        seeds = {result.row.seed for result in other.results}
        return Group(self.label, self.bits, tuple(result for result in self.results if result.row.seed in seeds))

    def having(self, name: str) -> Group:
        """The line without the seeds of which something was not measured."""
        return Group(self.label, self.bits, tuple(result for result in self.results if name in result.found))

    @property
    def notes(self) -> str:
        """What sets its grids apart."""
        return self.results[0].found.get("notes", "")


def _scored(images: Iterable[dict[str, Any]], score: str) -> list[dict[str, Any]]:
    if score == "iou":
        return list(images)
    return [{**image, "ious": [200 * iou / (100 + iou) for iou in image["ious"]]} for image in images]


@dataclass(frozen=True)
class Chosen:
    """What a table shows.

    Attributes:
        sections: By (subject, scope, data): the float model, if it is there, and the other lines in order.
    """

    sections: dict[tuple[str, str, str], tuple[Group | None, tuple[Group, ...]]]


def read_results(folder: Path) -> list[Result]:
    """All rows of a folder.

    Raises:
        DataError: There are none, or one is damaged.
    """
    found = [read_result(path) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise DataError(f"there are no rows in {folder}; make them with python benchmarks/evidence.py run.")
    return found


def read_result(path: Path) -> Result:
    """One row.

    Raises:
        DataError: It is damaged, or something else.
    """
    content = read_json(path, FIX)
    missing = [name for name in ("row", "scores", "seconds", "made") if not isinstance(content.get(name), dict)]
    if missing:
        raise DataError(f"{path} is no row of evidence: it has no {', '.join(missing)}; {FIX}.")
    try:
        return Result(Row.from_dict(content["row"]), content, path)
    except ConfigError as error:
        raise DataError(f"{path} is no row of this version: {error} {FIX[0].upper() + FIX[1:]}.") from error


def choose(found: Sequence[Result], where: dict[str, Any], labels: Mapping[str, str] | None = None) -> Chosen:
    """The rows to show.

    Args:
        found: All rows.
        where: Fields of :class:`Row` and the values that they must have; None takes all.
        labels: What to call each label to show, in this order; none shows all by name.

    Raises:
        DataError: Nothing is left, or two rows of one label and seed have other settings.
    """
    where = {name: value for name, value in where.items() if value is not None}
    labels = labels or {}

    def fits(row: Row) -> bool:
        ignored = ("scope", "bits", "steps", "boxes", "images") if row.is_float else ()
        return all(getattr(row, name) == value for name, value in where.items() if name not in ignored)

    kept = [result for result in found if fits(result.row)]
    rows = [each for each in kept if not each.row.is_float and (not labels or each.row.label in labels)]
    floating = {(each.row.subject, each.row.data, each.row.limit): each for each in kept if each.row.is_float}
    if not rows:
        raise DataError("no row fits; leave out some of --subject, --scope, --data, --bits, --rows, --plan.")
    order = {shown: index for index, shown in enumerate(labels.values())}
    sections: dict[tuple[str, str, str], dict[tuple[str, str], dict[int, Result]]] = {}
    for result in rows:
        row = result.row
        seeds = sections.setdefault((row.subject, row.scope, row.data), {}).setdefault((row.bits, row.label), {})
        if row.seed in seeds:
            raise DataError(
                f"{seeds[row.seed].path.name} and {result.path.name} are of one label and seed, with other settings: "
                f"{', '.join(_different(seeds[row.seed].row, row))}. Give them labels of their own, or choose with "
                "--steps, --boxes or --images."
            )
        seeds[row.seed] = result
    shown = {}
    for place, groups in sections.items():
        lines = [
            Group(labels.get(label, label), bits, tuple(result for _, result in sorted(seeds.items())))
            for (bits, label), seeds in groups.items()
        ]
        lines.sort(key=lambda group: (BITS.get(group.bits, 9), order.get(group.label, 0), group.label))
        limits = {group.results[0].row.limit for group in lines}
        original = floating.get((place[0], place[2], limits.pop())) if len(limits) == 1 else None
        shown[place] = (Group(FLOAT, FLOAT, (original,)) if original else None, tuple(lines))
    return Chosen(shown)


def _different(a: Row, b: Row) -> list[str]:
    one, other = a.to_dict(), b.to_dict()
    return [name for name in one if one[name] != other[name]]


def scores_table(chosen: Chosen, reference: str) -> str:
    """Scores with ground-truth boxes."""

    def table(floating: Group | None, lines: tuple[Group, ...]) -> list[list[str]]:
        head = ["bits", "row", "seeds", "segm AP", "mean IoU", "DSC", "IoU to float", f"IoU to {reference}", "notes"]
        rows = [head]
        for group in [*([floating] if floating else []), *lines]:
            compared = reference_of(lines, group, reference)
            rows.append(
                [
                    "float" if group.bits == FLOAT else group.bits.upper(),
                    "" if group.bits == FLOAT else group.label,
                    "" if group.bits == FLOAT else str(len(group.results)),
                    *(mean_and_spread(group.values(name)) for name in ("segm_ap", "mean_iou", "dsc")),
                    *(difference(group, other) for other in (floating, compared)),
                    group.notes,
                ]
            )
        return _without_empty(rows)

    return sections(
        chosen,
        table,
        "Differences of mean IoU over the seeds that both rows have, with 95 % intervals over images; bold where 0 is "
        "outside.",
    )


def modality_table(chosen: Chosen, reference: str, score: str = "mean_iou") -> str:
    """Mean IoU by modality."""

    def table(floating: Group | None, lines: tuple[Group, ...]) -> list[list[str]]:
        groups = [*([floating] if floating else []), *lines]
        names = sorted({name for group in groups for name in group.results[0].found["scores"].get("sources", {})})
        rows = [["bits", "row", *names, "all"]]
        for group in groups:
            cells = []
            for name in names:
                values = [result.found["scores"]["sources"][name][score] for result in group.results]
                cells.append("-" if None in values else f"{statistics.fmean(values):.1f}")
            label = "" if group.bits == FLOAT else group.label
            total = f"{statistics.fmean(group.values(score)):.1f}"
            rows.append(["float" if group.bits == FLOAT else group.bits.upper(), label, *cells, total])
        return rows

    return sections(chosen, table, f"{_SCORES[score]} by modality, mean over seeds.")


_SCORES = {"mean_iou": "Mean IoU", "dsc": "DSC", "segm_ap": "Segm AP"}


def clicks_table(chosen: Chosen, reference: str) -> str:
    """Mean IoU with clicks, beside boxes."""

    def table(floating: Group | None, lines: tuple[Group, ...]) -> list[list[str]]:
        floating = floating.having("points") if floating else None
        groups = [*([floating] if floating and floating.results else []), *lines]
        counts = sorted({int(n) for group in groups for n in group.results[0].found["points"]["mean_iou"]})
        rows = [
            ["bits", "row", "box", *(f"{n} click{'s' * (n > 1)}" for n in counts), *(f"{n}: to float" for n in counts)]
        ]
        for group in groups:
            of_seeds = [result.found["points"]["mean_iou"] for result in group.results]
            means = [mean_and_spread([seed[str(n)] for seed in of_seeds]) for n in counts]
            differences = [
                _shown(difference_interval(_clicked(group, at), _clicked(floating, at)))
                if floating is not None and floating is not group and floating.results
                else ""
                for at in range(len(counts))
            ]
            label = "" if group.bits == FLOAT else group.label
            box = mean_and_spread(group.values("mean_iou"))
            rows.append(["float" if group.bits == FLOAT else group.bits.upper(), label, box, *means, *differences])
        return rows

    return sections(chosen, table, "Mean IoU with a box, and after simulated clicks without a box.", "points")


def _clicked(group: Group, at: int) -> list[dict[str, Any]]:
    """IoU after the clicks at a position, image by image: an image counts by its number of objects."""
    of_seeds = [
        [
            {"name": image["name"], "ious": [image["ious"][at]] * image["n"]}
            for image in found["points"]["per_image"]
            if image["n"]
        ]
        for found in (result.found for result in group.results)
    ]
    return averaged(of_seeds)


def facts(results: Sequence[Result], floating: Group | None) -> str:
    """A line that says what made a table's rows."""
    shown = [*results, *(floating.results if floating else ())]
    first = results[0]
    scores, row = first.found["scores"], first.row
    made = [result.found["made"] for result in shown]

    def each(name: str) -> str:
        return ", ".join(dict.fromkeys(str(entry[name]) for entry in made))

    seeds = ", ".join(map(str, sorted({result.row.seed for result in results})))
    steps = ", ".join(str(s) for s in sorted({result.row.steps for result in results if result.row.steps is not None}))
    return (
        f"{row.subject}, {'decoder alone (encoder in floating point)' if row.scope == 'decoder' else 'whole model'}; "
        f"{row.data}: {scores['n_images']} images, {scores['n_prompts']} boxes; calibration on {row.images} images, "
        f"{row.boxes} boxes each{f', {steps} steps a unit' if steps else ''}; seeds {seeds}. Commit {each('commit')}; "
        f"{each('device')}; torch {each('torch')}, transformers {each('transformers')}."
    )


def reference_of(lines: Sequence[Group], group: Group, label: str) -> Group | None:
    return next((line for line in lines if line.bits == group.bits and line.label == label), None)


def difference(group: Group, other: Group | None) -> str:
    """Over the seeds that both have: other seeds have other calibration images, which moves scores by themselves."""
    if other is None or other is group:
        return ""
    if other.bits != FLOAT:
        group, other = group.of_seeds(other), other.of_seeds(group)
        if not group.results:
            return ""
    return _shown(difference_interval(group.per_image(), other.per_image()))


def _shown(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"**{difference}**" if difference.is_clear else str(difference)


def sections(
    chosen: Chosen,
    table: Callable[[Group | None, tuple[Group, ...]], list[list[str]]],
    note: str,
    needs: str = "scores",
) -> str:
    """A table of each section, of the rows that have what it shows; one seed of a row may have it alone."""
    parts = []
    for _, (floating, lines) in sorted(chosen.sections.items()):
        lines = tuple(group for group in (line.having(needs) for line in lines) if group.results)
        rows = table(floating, lines) if lines else []
        if len(rows) > 1:
            parts += [markdown(rows), facts([each for group in lines for each in group.results], floating)]
    if not parts:
        raise DataError("none of these rows has what this table shows; run them with --clicks or --diagnose.")
    return "\n\n".join([*parts, note])


def _without_empty(rows: list[list[str]]) -> list[list[str]]:
    """Without the columns that have a head alone."""
    kept = [at for at in range(len(rows[0])) if any(row[at] for row in rows[1:])]
    return [[row[at] for at in kept] for row in rows]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, the first row of which is the head."""
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def summary_table(chosen: Chosen, reference: str) -> str:
    """Scores on every evaluation set side by side, a line a row: the rows that all of them have."""
    shown = sorted(chosen.sections.items(), reverse=True)
    places = [(place, *found) for place, found in shown if not place[2].endswith(HELD_OUT)]
    if not places:
        raise DataError("no row of an evaluation set fits.")
    columns = [{group.label: group for group in lines} for _, _, lines in places]
    labels = [label for label in columns[0] if all(label in column for column in columns)]
    rows = [["row", *(f"{place[2]}: {name}" for place, _, _ in places for name in ("segm AP", "mean IoU", "to float"))]]
    original = ("float", [floating for _, floating, _ in places])
    for name, groups in [original, *((label, [column[label] for column in columns]) for label in labels)]:
        row = [name]
        for group, (_, floating, _) in zip(groups, places):
            scores = [mean_and_spread(group.values(score)) for score in ("segm_ap", "mean_iou")] if group else ["", ""]
            row += [*scores, difference(group, floating) if group else ""]
        rows.append(row)
    results = [result for column in columns for label in labels for result in column[label].results]
    if not labels or len({result.row.bits for result in results}) != 1:
        raise DataError("a summary is of rows that every data set has at the same bits; give --bits and --rows.")
    seeds = sorted({len(column[label].results) for column in columns for label in labels})
    note = "Differences of mean IoU with 95 % intervals over images; bold where 0 is outside."
    return f"{markdown(rows)}\n\nMean of {' or '.join(map(str, seeds))} seeds. {note}"


KINDS: dict[str, Callable[[Chosen, str], str]] = {
    "scores": scores_table,
    "modalities": modality_table,
    "modalities-ap": lambda chosen, reference: modality_table(chosen, reference, "segm_ap"),
    "modalities-dsc": lambda chosen, reference: modality_table(chosen, reference, "dsc"),
    "clicks": clicks_table,
    "summary": summary_table,
}
