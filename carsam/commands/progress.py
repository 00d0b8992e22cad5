"""Progress of long work: a bar on a terminal, plain lines elsewhere (a log, a CI job)."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from carsam.commands.common import duration, err

# Seconds between plain lines while a step of the work goes on.
PLAIN_INTERVAL = 30.0


class Reporter:
    """Shows how far work is, on stderr, while a ``with`` block runs.

    Args:
        title: What is going on.
    """

    def __init__(self, title: str):
        self._title = title
        self._started = self._last = time.monotonic()
        self._stage: object = None
        self._bar: Progress | None = None
        if err.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(10),
                TextColumn("{task.fields[detail]}"),
            )
            self._bar = Progress(*columns, TimeElapsedColumn(), console=err, transient=True)
            self._task = self._bar.add_task(title, total=None, detail="")

    def __enter__(self) -> Reporter:
        if self._bar is not None:
            self._bar.start()
        else:
            self._line(self._title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def units(self, unit: int, n_units: int, name: str, step: int, n_steps: int) -> None:
        """The callback of :func:`carsam.pipeline.quantize`."""
        # Short enough for the longest name, its bar and its steps on 80 columns.
        for prefix, short in (("mask_decoder.transformer.", "decoder."), ("vision_encoder.", "encoder.")):
            name = name.replace(prefix, short)
        position = f"unit {unit + 1}/{n_units}  {name}"
        done = (unit + step / max(1, n_steps)) / n_units
        self._show(unit, position, done, f"step {step}/{n_steps}" if n_steps else "")

    def images(self, done: int, total: int) -> None:
        """The callback of the evaluations."""
        self._show("images", self._title, done / total, f"image {done}/{total}")

    def _show(self, stage: object, position: str, done: float, detail: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=position, total=1.0, completed=done, detail=detail)
            return
        now = time.monotonic()
        # One line when a stage begins, then one now and then: a log must not grow by a line a step.
        if stage != self._stage or now - self._last >= PLAIN_INTERVAL:
            self._stage, self._last = stage, now
            self._line(f"[{duration(now - self._started)}] {position}  {detail}".rstrip())

    @staticmethod
    def _line(text: str) -> None:
        err.print(text, markup=False, soft_wrap=True)
