"""Rows of evidence for docs/RESULTS.md: run on one machine or several, kept as JSON, assembled into tables.

    python benchmarks/evidence.py run --plan decoder --data-root ../shared/data
    python benchmarks/evidence.py run --plan decoder --device cuda --workers 8 --deadline 500 --pack-rows rows.jsonl
    python benchmarks/evidence.py run --row RTN=rtn --row "QDrop,_30_steps=qdrop reconstruction.drop=0.3" --steps 30
    python benchmarks/evidence.py unpack rows.jsonl
    python benchmarks/evidence.py table --subject litemedsam --scope decoder --data medical
    python benchmarks/evidence.py fill docs/RESULTS.md
    python benchmarks/evidence.py bundle --plan decoder --out bundle

A plan lists rows (benchmarks/plans). Each row is quantized by carsam's own pipeline, packed, loaded back and measured
with ground-truth boxes, and with clicks where the plan says so; what is kept of it is one file in docs/results. Rows
whose file is there with the same settings are not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evidence_costs
import evidence_inside
import evidence_tables as tables
from evidence_data import FOLDERS, ROOT, Places
from evidence_rows import Row, once, read_plan, row_of

from carsam.errors import CarsamError, DataError
from carsam.output.files import write_text

RESULTS = ROOT / "docs" / "results"
KINDS = {**tables.KINDS, **evidence_inside.KINDS, **evidence_costs.KINDS}
# Of a row, what the command line may say of all of them.
FIELDS = ("subject", "scope", "data", "bits", "steps", "boxes", "images")


def planned(arguments: argparse.Namespace) -> tuple[Row, ...]:
    """The rows of the command line."""
    rows = [row for name in arguments.plan for row in read_plan(name)]
    common = {name: getattr(arguments, name) for name in FIELDS}
    common |= {"limit": arguments.limit, "clicks": arguments.clicks, "diagnose": arguments.diagnose}
    common = {name: value for name, value in common.items() if value is not None}
    for seed in arguments.seeds:
        rows += [row_of(text, {**common, "seed": seed}) for text in arguments.row]
    if not rows:
        raise DataError("there is nothing to run; name a plan with --plan, or a row with --row LABEL=METHOD.")
    return once(rows)


def is_done(row: Row, folder: Path) -> bool:
    """Whether a row's file holds it, with all that is to be measured."""
    path = folder / row.file_name
    if not path.is_file():
        return False
    kept = tables.read_result(path).row
    return kept.key == row.key and set(row.clicks) <= set(kept.clicks) and row.diagnose <= kept.diagnose


def run(arguments: argparse.Namespace) -> int:
    """Runs what is not there yet."""
    rows = planned(arguments)
    left = [row for row in rows if arguments.again or not is_done(row, arguments.results)]
    print(f"{len(rows)} rows, {len(rows) - len(left)} of them in {arguments.results.name} already", flush=True)
    if arguments.list:
        for row in left:
            print(row)
        return 0
    if arguments.threads is None and arguments.workers > 1:
        arguments.threads = 1
    if arguments.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # before a worker imports torch
    from evidence_workers import Settings, Sink, run_rows

    places = places_of(arguments)
    for row in {(row.base_data, row.held_out): row for row in left}.values():
        places.calibration_and_evaluation(row.base_data, row.held_out)  # what is missing is told now
    sink = Sink(arguments.results, arguments.pack_rows, arguments.failures or places.work / "failures.jsonl")
    settings = Settings(places, arguments.device, arguments.commit, arguments.threads)
    not_begun = run_rows(
        left,
        settings,
        sink,
        workers=arguments.workers,
        deadline=arguments.deadline,
        note=lambda line: print(line, flush=True),
    )
    print(f"{sink.written} rows written, {sink.failed} failed, {not_begun} not begun before the deadline")
    if sink.failed:
        print(f"what failed: {sink.failures}", file=sys.stderr)
    return int(bool(sink.failed or not_begun))


def places_of(arguments: argparse.Namespace) -> Places:
    """Where models and data lie."""
    given = {"data": arguments.data_root, "litemedsam": arguments.litemedsam, "work": arguments.work}
    return Places(**{name: value for name, value in given.items() if value is not None})


def unpack(arguments: argparse.Namespace) -> int:
    """Turns JSONL files of rows into one file a row."""
    from evidence_workers import write_row

    count = 0
    for path in arguments.files:
        if not path.is_file():
            raise DataError(f"there is no file {path}.")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
                row = Row.from_dict(entry["content"]["row"])
            except (ValueError, KeyError, TypeError) as error:
                # The last line of a machine that was taken away may be cut off.
                print(f"{path.name}, line {number} is left out: it is no row ({error})", file=sys.stderr)
                continue
            write_row(arguments.results / row.file_name, entry["content"])
            count += 1
    print(f"{count} rows in {arguments.results}")
    return 0


def table(arguments: argparse.Namespace) -> int:
    """Prints tables of what is there."""
    print(table_text(arguments, tables.read_results(arguments.results)))
    return 0


def table_text(arguments: argparse.Namespace, found: Sequence[tables.Result]) -> str:
    """The tables of a command line, in Markdown."""
    where = {name: getattr(arguments, name) for name in FIELDS}
    return KINDS[arguments.kind](tables.choose(found, where, labels(arguments)), arguments.reference)


def fill(arguments: argparse.Namespace) -> int:
    """Makes the tables of a document again: those between <!-- evidence table ... --> and <!-- end -->."""
    for path in arguments.files:
        write_text(path, filled(path.read_text(encoding="utf-8"), arguments.results))
    return 0


def filled(text: str, results: Path) -> str:
    """A document with its tables made again, each below the command that prints it.

    Raises:
        DataError: There is no table for a command in it.
    """
    found = tables.read_results(results)

    def block(match: re.Match[str]) -> str:
        words = shlex.split(match[1])
        arguments = parser().parse_args(words)
        command = f"    python benchmarks/evidence.py {match[1]}"
        return f"<!-- evidence {match[1]} -->\n{command}\n\n{table_text(arguments, found)}\n<!-- end -->"

    return re.sub(r"<!-- evidence (table [^\n]*) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def labels(arguments: argparse.Namespace) -> dict[str, str]:
    """Labels of the rows to show, in order, and what to call each; none shows all."""
    if not arguments.rows:
        return {row.label: row.label for name in arguments.plan for row in read_plan(name)}
    pairs = [part.strip().rpartition("=") for part in arguments.rows.split(";")]
    return {label.strip(): shown.strip() or label.strip() for shown, _, label in pairs}


def bundle(arguments: argparse.Namespace) -> int:
    """Copies models and images that some rows need into one folder, for a machine without anything."""
    from evidence_measure import Bench

    rows, places = planned(arguments), places_of(arguments)
    bench = Bench(places)
    needed: dict[str, set[str]] = {}
    for row in rows:
        if row.base_data == "embedded":
            continue
        calibration, evaluation = FOLDERS[row.base_data]
        _, data = places.calibration_and_evaluation(row.base_data, row.held_out)
        entries = json.loads(data.coco.read_text(encoding="utf-8"))["images"]
        judged = calibration if row.held_out else evaluation
        needed.setdefault(judged, set()).update(entry["file_name"] for entry in entries)
        if not row.is_float:
            needed.setdefault(calibration, set()).update(image.name for image in bench.calibration_of(row).images)
    for name, images in needed.items():
        # The annotations stay whole: which images a seed chooses depends on all that could be chosen.
        folder = arguments.out / "data" / name
        (folder / "images").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(places.data / name / "instances.json", folder / "instances.json")
        for each in images:
            shutil.copyfile(places.data / name / "images" / each, folder / "images" / each)
        print(f"{name}: {len(images)} images, {_megabytes(folder)}")
    if any(row.subject == "litemedsam" for row in rows):
        shutil.copyfile(places.litemedsam, arguments.out / "lite_medsam.pth")
        print(f"lite_medsam.pth: {places.litemedsam.stat().st_size / 1e6:.1f} MB")
    print(f"{arguments.out}: {_megabytes(arguments.out)}")
    return 0


def _megabytes(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.1f} MB"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True)

    def add(name: str, function: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=function.__doc__.splitlines()[0])
        command.set_defaults(function=function)
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of rows, one JSON file each")
        return command

    def add_selection(command: argparse.ArgumentParser, **defaults: Any) -> None:
        command.add_argument("--plan", action="append", default=[], help="name in benchmarks/plans, or a YAML file")
        for name, kind in (("subject", str), ("scope", str), ("data", str), ("bits", str)):
            command.add_argument(f"--{name}", type=kind, default=defaults.get(name))
        for name in ("steps", "boxes", "images"):
            command.add_argument(f"--{name}", type=int)

    def add_rows(command: argparse.ArgumentParser) -> None:
        add_selection(command)
        command.add_argument("--row", action="append", default=[], help="LABEL=METHOD key=value ... (_ for a space)")
        command.add_argument("--seeds", type=_numbers, default=(0,), help="of --row, by commas")
        command.add_argument("--limit", type=int, help="evaluation images of --row")
        command.add_argument("--clicks", type=_numbers, help="of --row, by commas")
        command.add_argument("--diagnose", type=int, help="images of --row to diagnose")
        command.add_argument("--data-root", type=Path, help="folder with medical, coco-train100 and coco-val50")
        command.add_argument("--litemedsam", type=Path, help="LiteMedSAM's checkpoint")
        command.add_argument("--work", type=Path, help="folder for finished units; runs/evidence without")

    command = add("run", run)
    add_rows(command)
    command.add_argument("--device", default="cpu")
    command.add_argument("--workers", type=int, default=1, help="processes that share the machine")
    command.add_argument("--threads", type=int, help="of each; 1 with several workers")
    command.add_argument("--deadline", type=float, help="seconds after which no row is begun")
    command.add_argument("--pack-rows", type=Path, help="append rows to this JSONL file instead of --results")
    command.add_argument("--failures", type=Path, help="JSONL file of rows that failed")
    command.add_argument("--commit", help="of the code, where git cannot tell it")
    command.add_argument("--again", action="store_true", help="also rows that are there")
    command.add_argument("--list", action="store_true", help="only name the rows that would run")

    command = add("unpack", unpack)
    command.add_argument("files", type=Path, nargs="+", help="JSONL files that run --pack-rows wrote")

    command = add("table", table)
    add_selection(command)
    command.add_argument("kind", nargs="?", choices=sorted(KINDS), default="scores")
    command.add_argument("--rows", help="labels to show in this order, by ;, each perhaps as NAME=LABEL")
    command.add_argument("--reference", default="CAR-SAM", help="label of the row that the others are compared with")

    command = add("fill", fill)
    command.add_argument("files", type=Path, nargs="+", help="Markdown")

    command = add("bundle", bundle)
    add_rows(command)
    command.add_argument("--out", type=Path, required=True)
    return made


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    try:
        return arguments.function(arguments)
    except CarsamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    logging.getLogger("carsam").setLevel(logging.ERROR)  # a line of each row is enough
    sys.exit(main())
