"""How long a quantization has taken, stage by stage, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from carsam.run.progress import STAGES, PlannedUnit

_FIRST, _LAST = STAGES[: STAGES.index("ranges")], STAGES[STAGES.index("units") + 1 :]

# Before any unit is measured, the stages before them are taken for this share of the whole.
_BEFORE_UNITS = 0.05
# Where something is measured or chosen before them, which can take as long as they do: what follows takes so many times
# as long as that stage. Units that learn take three times as long as the choices, those that do not about as long.
_MEASURING, _BEHIND_MEASURING = ("bits", "choices"), 3.0
# What follows the units takes about this share of their time.
_AFTER_UNITS = 0.03
# A unit's ranges and errors cost about as much as this many of its steps, where nothing is measured yet.
_FIXED_STEPS = 50


class Course:
    """The times of a quantization so far, and from them the time left.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self.started = clock()
        self.seconds: dict[str, float] = {}
        self._stage: str | None = None
        self._stage_started = self.started
        self._within = 0.0
        self._units: Sequence[PlannedUnit] = ()
        self._finished: dict[str, list[tuple[float, int]]] = {}  # by kind: seconds and weight
        self._current: int | None = None
        self._unit_started = self._steps_started = self.started
        self._step = 0
        self._kept = False
        self._done = 0.0

    def stage(self, name: str, done: int, total: int) -> None:
        """A stage is at ``done`` of ``total`` parts; a new name ends the one before."""
        if name != self._stage:
            self._end_unit()
            self._end_stage()
            self._stage = name
        self._within = done / total if total else 0.0

    def expect(self, units: Sequence[PlannedUnit]) -> None:
        """These units will come."""
        self._units = units

    def unit(self, index: int, step: int) -> None:
        """Unit ``index`` is at a step."""
        now = self._clock()
        if index != self._current:
            self._end_unit()
            self._current, self._unit_started, self._kept = index, now, False
        if step <= 1:
            self._steps_started = now
        self._step = step

    def kept(self, index: int) -> None:
        """Unit ``index`` was found finished."""
        self.unit(index, 0)
        self._kept = True

    def finish(self) -> None:
        """The work is done."""
        self._end_unit()
        self._end_stage()
        self._stage = None

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self.started

    @property
    def left(self) -> float | None:
        """Seconds to the end; None while nothing tells."""
        if self._stage != "units" or self._current is None:
            return None
        rates = self._rates()
        if not rates:
            return None
        known = sum(rates.values()) / len(rates)
        spent = self._clock() - self._unit_started
        unit = self._units[self._current]
        rest = 0.0 if self._kept else max(0.0, rates.get(unit.kind, known) * _weight(unit) - spent)
        rest += sum(rates.get(unit.kind, known) * _weight(unit) for unit in self._units[self._current + 1 :])
        return rest + _AFTER_UNITS * (rest + self.seconds.get("units", 0.0) + self._clock() - self._stage_started)

    @property
    def share(self) -> float:
        """How much of the whole is done, 0 to 1; never falls."""
        if self._stage in _LAST:
            done = 1 - _AFTER_UNITS * (1 - (_LAST.index(self._stage) + self._within) / len(_LAST))
        elif self._stage == "units":
            left, elapsed = self.left, self.elapsed
            done = _BEFORE_UNITS if left is None else elapsed / max(1e-9, elapsed + left)
        elif self._stage == "ranges":
            done = _BEFORE_UNITS + (1 - _BEFORE_UNITS - _AFTER_UNITS) * self._within
        elif self._stage in _MEASURING and self._within:
            whole = (self._clock() - self._stage_started) / self._within
            done = self.elapsed / max(1e-9, self.elapsed + whole * (1 - self._within + _BEHIND_MEASURING))
        else:
            position = _FIRST.index(self._stage) if self._stage in _FIRST else 0
            done = _BEFORE_UNITS * (position + self._within) / len(_FIRST)
        self._done = max(self._done, min(done, 0.99))
        return self._done

    def _rates(self) -> dict[str, float]:
        """Seconds by weight for each kind of unit that is measured."""
        rates = {}
        for kind, found in self._finished.items():
            rates[kind] = sum(seconds for seconds, _ in found) / sum(weight for _, weight in found)
        if self._current is not None and not self._kept and self._step > 1:
            unit, now = self._units[self._current], self._clock()
            if unit.kind not in rates:
                # Its first steps tell how long the others take; what came before them is spent already.
                whole = (self._steps_started - self._unit_started) + unit.steps * (now - self._steps_started) / (
                    self._step - 1
                )
                rates[unit.kind] = whole / _weight(unit)
        return rates

    def _end_unit(self) -> None:
        if self._current is not None and not self._kept:
            unit = self._units[self._current]
            seconds = self._clock() - self._unit_started
            self._finished.setdefault(unit.kind, []).append((seconds, _weight(unit)))
        self._current = None

    def _end_stage(self) -> None:
        now = self._clock()
        if self._stage is not None:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._stage_started
        self._stage_started = now


def _weight(unit: PlannedUnit) -> int:
    """What a unit costs, in steps."""
    return unit.steps + _FIXED_STEPS
