"""What every grid says of itself: to the registry, to ``config.json`` and to tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn


class Grid(nn.Module):
    """Base of the quantizers of activations and of softmax outputs.

    A grid is one class in one module, with everything that is particular to it. It is built as
    ``cls(bits, always=..., **arguments)``; with ``always`` it quantizes whatever is simulated, as packed models do. Its
    buffers are what a packed file holds of it: float32, which keep all of their bits there, and uint8. At 16 bits there
    are none.

    Attributes:
        grid: Its name in ``config.json``.
        note: What a table says of it; empty where rows are compared without a word (uniform, one grid a tensor).
        arguments: What ``config.json`` may hold beside ``grid`` and ``bits``, whole numbers from 0 to the value here;
            they are arguments of the constructor.
        bits: Bits of a code, 2 to 8; 16 leaves the values in floating point.
    """

    grid: ClassVar[str] = ""
    note: ClassVar[str] = ""
    arguments: ClassVar[Mapping[str, int]] = {}
    bits: int

    def spec(self) -> dict[str, Any]:
        """What ``config.json`` says of the site: ``grid``, ``bits``, and the arguments that build its quantizer."""
        return {"grid": self.grid, "bits": self.bits}

    def fault(self) -> str:
        """What is wrong with the buffers, as in "no usable scale"; empty where nothing is."""
        return ""
