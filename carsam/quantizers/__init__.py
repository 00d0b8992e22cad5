"""Grids, rounding, and the layers that use them.

A new grid is one new module in this folder, or in any package that announces itself (see :mod:`carsam.plugins`): a
:class:`SiteQuantizer` for activations, a :class:`SoftmaxQuantizer` for softmax outputs.
"""

from carsam.quantizers.channel import ChannelQuantizer
from carsam.quantizers.grouped import GroupedQuantizer
from carsam.quantizers.hybrid import HybridQuantizer
from carsam.quantizers.layers import QuantizedLayer
from carsam.quantizers.registry import activation_grids, softmax_grids
from carsam.quantizers.shifted import ShiftedQuantizer
from carsam.quantizers.simulation import Simulation, current, simulate
from carsam.quantizers.site import SiteQuantizer
from carsam.quantizers.softmax import SoftmaxQuantizer
from carsam.quantizers.softmax_log1p import Log1pSoftmax
from carsam.quantizers.softmax_log2 import Log2Softmax
from carsam.quantizers.softmax_row_maximum import RowMaximumSoftmax
from carsam.quantizers.softmax_uniform import UniformSoftmax
from carsam.quantizers.uniform import ActivationQuantizer

__all__ = [
    "ActivationQuantizer",
    "ChannelQuantizer",
    "GroupedQuantizer",
    "HybridQuantizer",
    "Log1pSoftmax",
    "Log2Softmax",
    "QuantizedLayer",
    "RowMaximumSoftmax",
    "ShiftedQuantizer",
    "Simulation",
    "SiteQuantizer",
    "SoftmaxQuantizer",
    "UniformSoftmax",
    "activation_grids",
    "current",
    "simulate",
    "softmax_grids",
]
