"""Grids, rounding, and the layers that use them."""

from carsam.quantizers.layers import QuantizedLayer
from carsam.quantizers.simulation import Simulation, current, simulate
from carsam.quantizers.softmax import SOFTMAX_GRIDS, RowMaximumSoftmax, UniformSoftmax
from carsam.quantizers.uniform import ActivationQuantizer

__all__ = [
    "SOFTMAX_GRIDS",
    "ActivationQuantizer",
    "QuantizedLayer",
    "RowMaximumSoftmax",
    "Simulation",
    "UniformSoftmax",
    "current",
    "simulate",
]
