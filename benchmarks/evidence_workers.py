"""Rows of evidence in several processes that share a machine: a queue, a deadline, and nothing lost.

The parent hands out rows and writes what comes back; a row that fails, or kills its process, does not stop the others.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from evidence_data import Places
from evidence_measure import Bench
from evidence_rows import Row

from carsam.output.files import write_text

# Of a file of packed rows; a new one is begun behind it.
MOST_BYTES = 15 * 2**20


@dataclass
class Sink:
    """Where rows and failures go, each flushed at once.

    Attributes:
        results: Folder of JSON files, one a row.
        packed: A JSONL file to append to instead; further ones lie beside it where it grows too large.
        failures: A JSONL file of rows that failed.
    """

    results: Path
    packed: Path | None
    failures: Path
    written: int = 0
    failed: int = 0
    _part: int = field(default=0, repr=False)

    def write(self, found: dict[str, Any]) -> None:
        """A finished row."""
        row = Row.from_dict(found["row"])
        if self.packed is None:
            write_row(self.results / row.file_name, found)
        else:
            line = json.dumps({"file": row.file_name, "content": found}, separators=(",", ":"), allow_nan=False)
            path = self._path()
            if path.exists() and path.stat().st_size + len(line) > MOST_BYTES:
                self._part += 1
                path = self._path()
            _append(path, line)
        self.written += 1

    def _path(self) -> Path:
        assert self.packed is not None
        return self.packed if not self._part else self.packed.with_stem(f"{self.packed.stem}-{self._part}")

    def fail(self, row: Row, error: str) -> None:
        """A row that could not be finished."""
        _append(self.failures, json.dumps({"row": row.to_dict(), "error": error}))
        self.failed += 1


def _append(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_row(path: Path, found: dict[str, Any]) -> None:
    """A row's file: one line for each entry of a list of images or units, so that a change of one shows as such."""
    write_text(path, dumps(found))


def dumps(found: dict[str, Any]) -> str:
    """JSON with a line for each of the innermost lists' entries, not for each number."""

    def text(value: Any, indent: int) -> str:
        flat = json.dumps(value, allow_nan=False, ensure_ascii=False)
        if len(flat) + indent <= 118 or not isinstance(value, (dict, list)) or not value:
            return flat
        pad, end = " " * (indent + 1), " " * indent
        if isinstance(value, dict):
            lines = [f"{pad}{json.dumps(key)}: {text(item, indent + 1)}" for key, item in value.items()]
            return "{\n" + ",\n".join(lines) + f"\n{end}}}"
        if all(isinstance(item, (int, float)) for item in value):
            return flat
        return "[\n" + ",\n".join(pad + text(item, indent + 1) for item in value) + f"\n{end}]"

    return text(found, 0) + "\n"


@dataclass(frozen=True)
class Settings:
    """What a worker is started with."""

    places: Places
    device: str
    commit: str | None
    threads: int | None

    def bench(self) -> Bench:
        """Set up in the process that computes."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return Bench(self.places, self.device, self.commit)


def run_rows(
    rows: Sequence[Row],
    settings: Settings,
    sink: Sink,
    *,
    workers: int,
    deadline: float | None = None,
    note: Callable[[str], None] = print,
) -> int:
    """Runs rows in order.

    Args:
        rows: Those to run.
        settings: Of every worker.
        sink: Where results go.
        workers: Processes; with one, everything runs in this one.
        deadline: Seconds from now after which no row is begun.
        note: Told a line for each row.

    Returns:
        Rows that were not begun.
    """
    until = None if deadline is None else time.monotonic() + deadline
    started = time.monotonic()
    done = 0

    def finish(row: Row, found: dict[str, Any] | str) -> None:
        nonlocal done
        done += 1
        at = f"[{time.monotonic() - started:6.0f} s] {done}/{len(rows)} {row}"
        if isinstance(found, str):
            sink.fail(row, found)
            note(f"{at}: FAILED: {found.strip().splitlines()[-1][:300]}")
            return
        sink.write(found)
        scores = found["scores"]
        shown = ", ".join(
            f"{key} {scores[key]:.1f}" for key in ("segm_ap", "mean_iou", "dsc") if scores[key] is not None
        )
        note(f"{at}: {shown} ({found['seconds']['all']:.0f} s)")

    if workers <= 1:
        bench = settings.bench()
        for index, row in enumerate(rows):
            if until is not None and time.monotonic() > until:
                return len(rows) - index
            finish(row, _attempt(bench, row))
        return 0
    return _spread(list(rows), settings, workers, until, finish)


def _attempt(bench: Bench, row: Row) -> dict[str, Any] | str:
    """What a row gives, or its traceback. Whatever goes wrong there is that row's own."""
    try:
        return bench.run(row)
    except Exception:
        return traceback.format_exc()
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _work(connection: Connection, settings: Settings) -> None:
    """A worker: takes rows until there are none."""
    logging.basicConfig(level=logging.ERROR)
    try:
        bench = settings.bench()
    except Exception:
        connection.send(traceback.format_exc())
        return
    connection.send(None)  # ready
    while (row := connection.recv()) is not None:
        connection.send(_attempt(bench, row))


@dataclass
class _Worker:
    process: Any
    connection: Connection
    row: Row | None = None
    ready: bool = False


def _spread(
    rows: list[Row],
    settings: Settings,
    count: int,
    until: float | None,
    finish: Callable[[Row, dict[str, Any] | str], None],
) -> int:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork

    def start() -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, settings), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    workers = [start() for _ in range(min(count, len(rows)))]
    waiting = list(reversed(rows))
    replacements = len(rows)  # a machine on which every process dies must come to an end
    try:
        while workers:
            for connection in wait([worker.connection for worker in workers]):
                worker = next(each for each in workers if each.connection is connection)
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    message = (
                        f"its process ended with code {worker.process.exitcode} (of -9: killed, perhaps for memory)"
                    )
                    workers.remove(worker)
                    if worker.row is not None:
                        finish(worker.row, message)
                    if waiting and worker.ready and replacements > 0:
                        replacements -= 1
                        workers.append(start())
                    continue
                if not worker.ready:
                    if message is not None:
                        raise RuntimeError(f"a worker could not be started:\n{message}")
                    worker.ready = True
                elif worker.row is not None:
                    finish(worker.row, message)
                late = until is not None and time.monotonic() > until
                worker.row = waiting.pop() if waiting and not late else None
                worker.connection.send(worker.row)
                if worker.row is None:
                    worker.process.join(timeout=30)
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.process.terminate()
    return len(waiting)
