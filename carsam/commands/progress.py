"""Progress of long work: a bar on a terminal or in a notebook, plain lines elsewhere (a log, a CI job)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from carsam.commands.common import duration, err, printable
from carsam.run.course import Course
from carsam.run.progress import KEPT, STAGES, PlannedUnit

# Seconds between plain lines while a step of the work goes on.
PLAIN_INTERVAL = 30.0


class Reporter:
    """Shows how far work is, on stderr, while a ``with`` block runs.

    Args:
        title: What is going on.
        quiet: Show nothing.
    """

    def __init__(self, title: str, *, quiet: bool = False):
        self._title, self._quiet = title, quiet
        self._started = self._last = time.monotonic()
        self._stage: object = None
        self._bar: Progress | None = None
        self.run = RunProgress(self)
        # In a notebook stderr is no terminal, but rich draws bars there.
        notebook = Console()
        console = notebook if notebook.is_jupyter else err
        if not quiet and (console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)):
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(10),
                TextColumn("{task.fields[detail]}", markup=False),
            )
            self._bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
            self._task = self._bar.add_task(printable(title), total=None, detail="")

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
        if kind is None:
            self.run.course.finish()

    @property
    def seconds(self) -> float:
        """Wall-clock time since the beginning."""
        return time.monotonic() - self._started

    def images(self, done: int, total: int) -> None:
        """The callback of the evaluations."""
        elapsed, share = time.monotonic() - self._started, done / max(1, total)
        left = elapsed * (1 - share) / share if share > 0 else None
        self.show("images", self._title, share, f"image {done}/{total}", left)

    def video(self, name: str, frame: int, n_frames: int, video: int, n_videos: int) -> None:
        """The callback of :func:`carsam.evaluate.video.evaluate_videos`."""
        share = (video + frame / max(1, n_frames)) / max(1, n_videos)
        elapsed = time.monotonic() - self._started
        left = elapsed * (1 - share) / share if share > 0 else None
        position = f"video {video + 1}/{n_videos}  {name}"
        self.show((video, "video"), position, share, f"frame {frame}/{n_frames}", left)

    def step(self, stage: str, noun: str, done: int, total: int) -> None:
        """The callback of :func:`carsam.diagnose.run.diagnose`, whose stages count different things."""
        self.show(stage, stage, done / max(1, total), f"{noun} {done}/{total}")

    def show(self, stage: object, position: str, done: float, detail: str, left: float | None = None) -> None:
        """Shows a position in the work; a plain line when ``stage`` is a new one, and now and then.

        Args:
            stage: Equal as long as the same thing goes on.
            position: What goes on.
            done: Share of the whole, 0 to 1.
            detail: A position within it.
            left: Seconds to the end, where known.
        """
        if self._quiet:
            return
        ahead = "" if left is None else f", {_rough(left)} left"
        if self._bar is not None:
            detail = f"{100 * done:.0f} %{ahead}  {detail}".rstrip()
            self._bar.update(self._task, description=printable(position), total=1.0, completed=done, detail=detail)
            return
        now = time.monotonic()
        # One line when a stage begins, then one now and then: a log must not grow by a line a step.
        if stage != self._stage or now - self._last >= PLAIN_INTERVAL:
            self._stage, self._last = stage, now
            self._line(f"[{duration(now - self._started)}, {100 * done:.0f} %{ahead}] {position}  {detail}".rstrip())

    def summarise(self) -> None:
        """A line for each stage with its time, and the total."""
        for line in self.times():
            self._line(line)

    def times(self) -> list[str]:
        """A line for each stage with its time, and the total of the wall clock."""
        course = self.run.course
        course.finish()
        stages = {**course.seconds, "total": self.seconds}
        width = max(map(len, stages))
        return [f"{name:<{width}}  {duration(seconds)}" for name, seconds in stages.items()]

    def _line(self, text: str) -> None:
        if not self._quiet:
            err.print(printable(text), soft_wrap=True)


@contextmanager
def shown(title: str, *, quiet: bool = False) -> Iterator[RunProgress]:
    """Shows a quantization while a block runs, and afterwards the time of its stages."""
    with Reporter(title, quiet=quiet) as reporter:
        yield reporter.run
        reporter.summarise()


class RunProgress:
    """Shows the stages of a quantization; what :func:`carsam.quantize` takes as ``progress``.

    Args:
        reporter: Shows them.
    """

    def __init__(self, reporter: Reporter):
        self._reporter = reporter
        self._units: Sequence[PlannedUnit] = ()
        self.restart("")

    def restart(self, context: str) -> None:
        """Another quantization begins, whose lines begin with ``context``."""
        self._context = context and f"{context}: "
        self._units = ()
        self.course = Course()
        self.course.stage(STAGES[0], 0, 0)

    def stage(self, name: str, done: int, total: int) -> None:
        """See :class:`carsam.run.progress.StageProgress`."""
        self.course.stage(name, done, total)
        if name != "units":
            self._show(name, name, f"{done}/{total}" if total else "")

    def expect(self, units: Sequence[PlannedUnit]) -> None:
        """See :class:`carsam.run.progress.StageProgress`."""
        self._units = units
        self.course.expect(units)

    def __call__(self, unit: int, n_units: int, name: str, step: int, n_steps: int) -> None:
        """See :class:`carsam.run.progress.StageProgress`."""
        if not self._units:
            return  # observed ranges: their stage says as much
        kept = name.endswith(KEPT)
        if unit < len(self._units):
            self.course.stage("units", 0, 0)
            self.course.kept(unit) if kept else self.course.unit(unit, step)
            # Short enough for the longest name, its bar and its steps on 80 columns.
            name = (self._units[unit].short or self._units[unit].name) + (KEPT if kept else "")
        self._show((unit, kept), f"unit {unit + 1}/{n_units}  {name}", f"step {step}/{n_steps}" if n_steps else "")

    def _show(self, stage: object, position: str, detail: str) -> None:
        key = (self._context, stage)
        self._reporter.show(key, self._context + position, self.course.share, detail, self.course.left)


def _rough(seconds: float) -> str:
    """A time that is only an estimate: ``40 s``, ``3 min``, ``2 h 5 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
