"""Records what activation sites see over the whole calibration set, and sets their grids (METHOD.md, 2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from carsam.quantizers.simulation import simulate
from carsam.quantizers.site import SiteQuantizer


class RangeRecorder:
    """Records the activation sites of some modules while a ``with recorder.recording()`` block runs the model."""

    def __init__(self, modules: list[nn.Module]):
        self.records = {
            part: part.record()
            for module in modules
            for part in module.modules()
            if isinstance(part, SiteQuantizer) and part.bits < 16
        }

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records every pass inside the block; quantizers of other modules are not touched."""

        def observe(quantizer: SiteQuantizer, values: Tensor, **context: Any) -> None:
            if quantizer in self.records:
                self.records[quantizer].update(values, **context)

        with torch.no_grad(), simulate(observe=observe):
            yield

    def apply(self, observer: str) -> None:
        """Sets the grids of all recorded sites; one that names an observer of its own gets that one's.

        Raises:
            RuntimeError: A site saw no value: the recorded passes did not reach it.
        """
        for quantizer, record in self.records.items():
            if not record.seen:
                raise RuntimeError("an activation site saw no value during calibration; was its module run at all?")
            record.fit(quantizer, quantizer.observer or observer)
