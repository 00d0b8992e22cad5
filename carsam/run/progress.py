"""How a run tells where it is: stages, and units within one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

KEPT = " (kept)"
"""Ends the name of a unit that an interrupted run finished; such a unit is reported once, with step 0 of 0."""

# In this order; "bits" under a budget, "choices" where the method makes some, "units" where it reconstructs units,
# "ranges" where it only observes ranges.
STAGES = ("preparing", "proposals", "bits", "choices", "weight grids", "ranges", "units", "packing", "verifying")


@dataclass(frozen=True)
class PlannedUnit:
    """A unit that a run will go through, or what is tuned after all of them.

    Attributes:
        name: Its own.
        kind: ``encoder``, ``decoder``, or what is tuned: units of one kind take similar times a step.
        steps: Of the optimiser.
        short: A shorter name for people.
    """

    name: str
    kind: str
    steps: int
    short: str = ""


@runtime_checkable
class StageProgress(Protocol):
    """A progress callback that is also told of stages.

    :func:`carsam.quantize` takes any callable as ``progress``; one that has a method ``stage`` is told of these too.
    """

    def __call__(self, unit: int, n_units: int, name: str, step: int, n_steps: int) -> None:
        """Unit ``unit`` of ``n_units`` (from 0), called ``name``, is at ``step`` of ``n_steps``.

        A unit taken over from an interrupted run comes once, with ``KEPT`` at the end of its name and 0 of 0 steps.
        """

    def stage(self, name: str, done: int, total: int) -> None:
        """Stage ``name`` (one of ``STAGES``) has done ``done`` of ``total`` parts; ``total`` is 0 where unknown.

        The first call of a stage has ``done`` 0. During "units" only that first call is made; the calls of the object
        itself say more. A stage ends when the next one begins.
        """

    def expect(self, units: Sequence[PlannedUnit]) -> None:
        """These units will come; called once, before the first."""


class Stages:
    """Measures the stages of a run, and tells the callback of them.

    Args:
        progress: What the caller gave; may be None, or a callable without ``stage``.

    Attributes:
        seconds: Wall-clock time by stage, in order.
    """

    def __init__(self, progress: Any = None):
        self._tell: Callable[[str, int, int], None] = getattr(progress, "stage", None) or (lambda *_: None)
        self._name = ""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, total: int = 0) -> Iterator[None]:
        """Runs a block as a stage of ``total`` parts."""
        started, self._name = time.perf_counter(), name
        self._tell(name, 0, total)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def advance(self, done: int, total: int) -> None:
        """``done`` of ``total`` parts of the stage that runs are done."""
        self._tell(self._name, done, total)
