"""Grids, rounding, and the layers that use them."""

from carsam.quantizers.grouped import GroupedQuantizer
from carsam.quantizers.hybrid import HybridQuantizer
from carsam.quantizers.layers import QuantizedLayer
from carsam.quantizers.simulation import Simulation, current, simulate
from carsam.quantizers.site import SiteQuantizer
from carsam.quantizers.softmax import SOFTMAX_GRIDS, Log2Softmax, RowMaximumSoftmax, UniformSoftmax
from carsam.quantizers.uniform import ActivationQuantizer

ACTIVATION_GRIDS = {kind.grid: kind for kind in (ActivationQuantizer, GroupedQuantizer, HybridQuantizer)}

__all__ = [
    "ACTIVATION_GRIDS",
    "SOFTMAX_GRIDS",
    "ActivationQuantizer",
    "GroupedQuantizer",
    "HybridQuantizer",
    "Log2Softmax",
    "QuantizedLayer",
    "RowMaximumSoftmax",
    "Simulation",
    "SiteQuantizer",
    "UniformSoftmax",
    "current",
    "simulate",
]
