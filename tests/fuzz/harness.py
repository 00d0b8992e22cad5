"""Runs mutated inputs in a process of its own, and tells which of them were no success and no ``CarsamError``."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS, MEGABYTES = 5.0, 3000
_START_SECONDS = 120.0


@dataclass(frozen=True)
class Case:
    """One mutated input; the same seed, kind and index give the same input."""

    kind: str
    index: int
    seed: int = 0

    @property
    def command(self) -> str:
        """How to run it again."""
        return f"python -m benchmarks.fuzz --seed {self.seed} --kind {self.kind} --index {self.index}"


@dataclass(frozen=True)
class Outcome:
    """What became of an input.

    Attributes:
        case: The input.
        outcome: ``read``, ``refused`` (a ``CarsamError``) or ``fault``.
        text: The message, or what went wrong.
        seconds: Time that the reader took.
    """

    case: Case
    outcome: str
    text: str = ""
    seconds: float = 0.0


def plan(count: int, shares: dict[str, int], seed: int = 0) -> list[Case]:
    """About ``count`` inputs, by the kinds' shares; a smaller plan is a part of a larger one."""
    total = sum(shares.values())
    return [Case(kind, i, seed) for kind, share in shares.items() for i in range(max(1, round(count * share / total)))]


@dataclass
class Runner:
    """Runs cases one after the other; the process is started again after a fault that ended it.

    Args:
        packed: A packed folder of the embedded model.
        seconds: Limit for one input.
        megabytes: Memory that an input may take beyond what the process takes before.
        warm: Load the embedded model before the first input, so that no input is blamed for it.
    """

    packed: Path
    seconds: float = SECONDS
    megabytes: int = MEGABYTES
    warm: bool = True
    _process: subprocess.Popen[str] | None = field(default=None, repr=False)
    _answers: int = field(default=-1, repr=False)
    _errors: Any = field(default=None, repr=False)
    _open: ExitStack = field(default_factory=ExitStack, repr=False)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, cases: Iterable[Case]) -> Iterator[Outcome]:
        """What became of each case."""
        for case in cases:
            if self._process is None:
                self._start()
            assert self._process is not None and self._process.stdin is not None
            self._process.stdin.write(json.dumps({"kind": case.kind, "index": case.index, "seed": case.seed}) + "\n")
            self._process.stdin.flush()
            # Writing the input counts for the process, not for the reader: twice the limit before it is ended.
            found = self._answer(2 * self.seconds)
            if found is None:
                ended = self._ended()
                reason = f"took more than {2 * self.seconds:.0f} s" if ended is None else f"ended the process ({ended})"
                tail = self._stop()
                yield Outcome(case, "fault", f"{reason} {tail}".strip(), 2 * self.seconds)
                continue
            seconds = found.get("seconds", 0.0)
            if found["outcome"] != "fault" and seconds > self.seconds:
                found = {"outcome": "fault", "text": f"took {seconds:.1f} s"}
            yield Outcome(case, found["outcome"], found.get("text", ""), seconds)

    def _start(self) -> None:
        receive, send = os.pipe()
        self._errors = self._open.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115 - closed by _stop
        environment = {
            **os.environ,
            **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PYTHONFAULTHANDLER": "1"},
            # A worker that is ended leaves its files: they go with this folder.
            **dict.fromkeys(("TMPDIR", "CARSAM_CACHE"), self._open.enter_context(tempfile.TemporaryDirectory())),
        }
        worker = str(Path(__file__).with_name("worker.py"))
        arguments = [str(send), str(ROOT), str(self.packed), str(self.megabytes * 1_000_000), str(int(self.warm))]
        self._process = subprocess.Popen(
            [sys.executable, worker, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=[send],
            text=True,
            env=environment,
            cwd=ROOT,
        )
        os.close(send)
        self._answers = receive
        if self._answer(_START_SECONDS) is None:
            raise RuntimeError(f"the worker did not start: {self._stop()}")

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        """The next line of the worker; None where it does not come in time, or the worker ended."""
        line, end = b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._answers], [], [], max(0.0, end - time.monotonic()))
            piece = os.read(self._answers, 65536) if ready else b""
            if not piece:
                return None
            line += piece
        return json.loads(line)

    def _ended(self) -> int | None:
        """How the worker ended; None where it is at work still."""
        assert self._process is not None
        try:
            return self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            return None

    def _stop(self) -> str:
        """Ends the worker; what it wrote last to its standard error."""
        if self._process is None:
            return ""
        self._process.kill()
        self._process.wait()
        os.close(self._answers)
        self._errors.seek(0)
        tail = self._errors.read()[-1500:]
        self._open.close()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process = None
        return tail
