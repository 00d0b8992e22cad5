"""What a run carries through all of its stages: where it computes, what it keeps, whom it tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from carsam.calibrate.cache import CacheSpace
from carsam.reconstruct.optimize import optimise
from carsam.run.progress import Stages
from carsam.run.store import UnitStore

if TYPE_CHECKING:
    from torch import nn

    from carsam.reconstruct.units import Unit

Progress = Callable[[int, int, str, int, int], None]
"""Called as ``progress(unit_index, n_units, unit_name, step, n_steps)``; see :mod:`carsam.run.progress`."""


@dataclass
class Hooks:
    """Places where somebody who measures a run may look in or step in; they do nothing by themselves.

    Attributes:
        around: Entered around each piece of work as ``around(name)``: "transform", "fit weights", "ranges", "unit",
            "pack", "write", "verify". For timings.
        unit_found: Told the name of each unit that came from the store.
        optimise: The optimiser loop, called as :func:`carsam.reconstruct.optimize.optimise`. For profilers.
        learned: Given the model and a unit when its rounding is learned and no weight of it is an integer yet.
        before_packing: Given the model, all of its weights integers, and nothing packed yet.
    """

    around: Callable[[str], Any] | None = None
    unit_found: Callable[[str], None] = lambda _name: None
    optimise: Callable[..., list[tuple[int, float]]] = optimise
    learned: Callable[[nn.Module, Unit], None] | None = None
    before_packing: Callable[[nn.Module], None] = lambda _model: None

    @contextmanager
    def work(self, name: str) -> Iterator[None]:
        """Does a piece of work inside ``around``."""
        if self.around is None:
            yield
            return
        with self.around(name):
            yield


@dataclass
class RunContext:
    """What a run carries through its stages.

    Attributes:
        device: Where it computes.
        seed: Of everything random.
        store: Finished units.
        space: Budget of the activation caches.
        progress: Told of units and steps.
        stages: Told of stages; keeps their timings.
        hooks: For whoever measures the run.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    store: UnitStore = field(default_factory=lambda: UnitStore(None))
    space: CacheSpace = field(default_factory=CacheSpace)
    progress: Progress | None = None
    stages: Stages = field(default_factory=Stages)
    hooks: Hooks = field(default_factory=Hooks)
