"""Units of a few layers, made ready for the refit."""

import torch

from carsam.calibrate.observers import RangeRecorder
from carsam.compensate.passes import FloatRows, QuantizedPasses
from carsam.quantizers import ActivationQuantizer, QuantizedLayer, simulate


def with_ranges(unit, layers, items, weight_bits, input_bits):
    """The unit with some of its own layers being quantized: ranges seen on the items, grids fitted."""
    for name in layers:
        setattr(unit, name, QuantizedLayer(getattr(unit, name), weight_bits, ActivationQuantizer(input_bits)))
    recorder = RangeRecorder([unit])
    with recorder.recording():
        for item in items:
            unit(item)
    recorder.apply("mse")
    for name in layers:
        getattr(unit, name).fit_weight()
    return unit


@torch.no_grad()
def passes(unit, layers, items):
    """What the refit is given: passes over the unit, and rows of its layers in the float model."""
    rows = FloatRows(unit, layers, len(items))
    with rows.watching(), simulate(weights=False, activations=False):
        for item in items:
            unit(item)
    return QuantizedPasses(unit, layers, [lambda item=item: unit(item) for item in items]), rows.rows
