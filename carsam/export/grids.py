"""Activation grids in ONNX: codes that an integer product can read, or decoded values where no such codes exist.

A grid runs in integers if x̂ is a sum of terms scale · (codes − zero_point) with 8-bit codes, plus a constant. The
uniform grid is one term, the shifted grid one and a constant for each channel; the grouped grid one term a group of
channels; the log-uniform grid two, one for each zone, where its log zone has at most eight codes (at 4 bits always): a
power of two times 1, 2, 4, … 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from carsam.errors import ConfigError
from carsam.export.graph import Stretch
from carsam.quantizers import (
    ActivationQuantizer,
    ChannelQuantizer,
    GroupedQuantizer,
    HybridQuantizer,
    ShiftedQuantizer,
)
from carsam.quantizers.affine import qmax

# Codes of the log zone whose values fit a byte: 1, 2, 4, … 128.
LOG_CODES = 8


@dataclass(frozen=True)
class Term:
    """One integer part of an activation: scale · (codes − zero_point), of some of its channels.

    Attributes:
        codes: Name of a uint8 tensor.
        scale: Step.
        zero_point: Code of zero.
        channels: Which channels of the last dimension it holds, in this order; None for all.
    """

    codes: str
    scale: float
    zero_point: int
    channels: np.ndarray | None = None


@dataclass(frozen=True)
class Terms:
    """An activation in integers: the sum of its terms, and ``offset`` everywhere, or (channels,) of it."""

    terms: tuple[Term, ...]
    offset: float | np.ndarray = 0.0


def uniform_codes(
    graph: Stretch,
    x: str,
    scale: float | np.ndarray,
    zero_point: int | np.ndarray,
    bits: int,
    *,
    signed: bool = False,
    axis: int | None = None,
) -> tuple[str, int]:
    """Codes of a uniform grid: clip(round(x / scale) + zero_point, 0, qmax).

    QuantizeLinear rounds and saturates as the simulation does; fewer than 8 bits need a clip, which on bytes costs a
    quarter of what it costs on floats, and keeps out of the way of fusions with what stands before.

    Args:
        graph: Where to.
        x: Float tensor.
        scale: Step; one a channel of ``axis`` if there is one.
        zero_point: Code of zero, likewise.
        bits: Of a code.
        signed: As int8: the second operand of a product in the U8S8 kernels. Codes of fewer than 8 bits stay what they
            are.
        axis: Of the channels.

    Returns:
        Name of a tensor of x's shape, uint8 or int8, and what to subtract from its zero points (0 or 128).
    """
    shift = 128 if signed and bits == 8 else 0
    kind = np.int8 if signed else np.uint8
    attributes = {} if axis is None else {"axis": axis}
    codes = graph.node(
        "QuantizeLinear",
        x,
        graph.constant("scale", scale, np.float32),
        graph.constant("zero_point", np.asarray(zero_point, np.int64) - shift, kind),
        **attributes,
    )
    if bits < 8:
        codes = graph.node("Clip", codes, graph.constant("low", 0, kind), graph.constant("high", qmax(bits), kind))
    return codes, shift


def integer_terms(graph: Stretch, x: str, quantizer: nn.Module) -> Terms | None:
    """An activation in integers; None where its grid has no such form (or is none)."""
    bits = quantizer.bits
    if bits >= 16:
        return None
    if isinstance(quantizer, ActivationQuantizer):
        scale, zero = float(quantizer.scale), int(quantizer.zero_point)
        return Terms((Term(uniform_codes(graph, x, scale, zero, bits)[0], scale, zero),))
    if isinstance(quantizer, ShiftedQuantizer):
        codes, scale, shift = _shifted_codes(graph, x, quantizer)
        return Terms((Term(codes, scale, 0),), offset=shift)
    if isinstance(quantizer, GroupedQuantizer):
        return _grouped_terms(graph, x, quantizer)
    if isinstance(quantizer, HybridQuantizer) and quantizer.zones()[0] <= LOG_CODES:
        return _hybrid_terms(graph, x, quantizer)
    return None


def _shifted_codes(graph: Stretch, x: str, quantizer: ShiftedQuantizer) -> tuple[str, float, np.ndarray]:
    """Codes of x − μ, the step, and μ (channels,)."""
    scale, shift = float(quantizer.scale), quantizer.shift.numpy()
    moved = graph.node("Sub", x, _along(graph, quantizer))
    return uniform_codes(graph, moved, scale, 0, quantizer.bits)[0], scale, shift


def _along(graph: Stretch, quantizer: ShiftedQuantizer) -> str:
    """The shift as it broadcasts against the site's values."""
    shape = (1, -1, 1, 1) if quantizer.maps else (-1,)
    return graph.constant("shift", quantizer.shift.numpy().reshape(shape), np.float32)


def _grouped_terms(graph: Stretch, x: str, quantizer: GroupedQuantizer) -> Terms:
    """Codes of all channels at once, then the channels of each group side by side."""
    scale, zero = quantizer.scale.numpy(), quantizer.zero_point.numpy()
    group = quantizer.group.numpy().astype(np.int64)
    codes, _ = uniform_codes(graph, x, scale[group], zero[group], quantizer.bits, axis=-1)
    members = [np.flatnonzero(group == index) for index in range(quantizer.groups)]
    members = [channels for channels in members if len(channels)]
    order = graph.constant("order", np.concatenate(members), np.int64)
    ordered = graph.node("Gather", codes, order, axis=-1)
    sizes = graph.constant("sizes", [len(channels) for channels in members], np.int64)
    parts = graph.node("Split", ordered, sizes, outputs=len(members), axis=-1) if len(members) > 1 else [ordered]
    found = []
    for part, channels in zip(parts, members):
        index = group[channels[0]]
        found.append(Term(part, float(scale[index]), int(zero[index]), channels))
    return Terms(tuple(found))


def _hybrid_terms(graph: Stretch, x: str, quantizer: HybridQuantizer) -> Terms:
    """The log zone as 128, 64, … 1 and 0, the uniform zone as 0, 1, 2, … (see :mod:`carsam.quantizers.hybrid`)."""
    (step, split), (log_codes, codes) = quantizer.scale.tolist(), quantizer.zones()
    offset = step * float(quantizer.offset)
    above, fraction = _hybrid_zones(graph, x, quantizer)
    uniform, _ = uniform_codes(graph, above, step, 0, 8)
    uniform = graph.node("Clip", uniform, graph.constant("low", 0, np.uint8), graph.constant("high", codes, np.uint8))
    # Exponents from 0 to L − 1 halve the split; from L on the value is the foot: 128 >> 8 is 0.
    exponent = graph.node(
        "QuantizeLinear",
        graph.node("Neg", graph.node("Log", fraction)),
        graph.constant("ln2", np.log(2.0), np.float32),
        graph.constant("dead", 8 - log_codes, np.uint8),
    )
    log = graph.node("BitShift", graph.constant("top", 128, np.uint8), exponent, direction="RIGHT")
    # With fewer than eight codes the shift starts at 8 − L, and the top is as much lower.
    return Terms((Term(log, split * 2.0 ** (1 - log_codes), 0), Term(uniform, step, 0)), offset=offset)


def _hybrid_zones(graph: Stretch, x: str, quantizer: HybridQuantizer) -> tuple[str, str]:
    """Height above the split, and height above the foot as a share of the split's, from below the log zone to 1."""
    (_, split), (log_codes, _) = quantizer.scale.tolist(), quantizer.zones()
    foot = float(quantizer.scale[0] * quantizer.offset)
    height = graph.node("Sub", x, graph.constant("foot", foot, np.float32))
    above = graph.node("Sub", height, graph.constant("split", split, np.float32))
    share = graph.node("Div", height, graph.constant("split", split, np.float32))
    ends = [graph.constant("end", value, np.float32) for value in (2.0 ** -(log_codes + 1), 1.0)]
    return above, graph.node("Clip", share, *ends)


def decoded(graph: Stretch, x: str, quantizer: nn.Module) -> str:
    """x̂ in floating point: what a grid without integer codes is multiplied as.

    Raises:
        ConfigError: The grid has no form in ONNX.
    """
    bits = quantizer.bits
    if bits >= 16:
        return x
    if isinstance(quantizer, ChannelQuantizer):
        return _channels_decoded(graph, x, quantizer)
    if isinstance(quantizer, ShiftedQuantizer):
        codes, scale, _ = _shifted_codes(graph, x, quantizer)
        zero = graph.constant("zero_point", 0, np.uint8)
        steps = graph.node("DequantizeLinear", codes, graph.constant("scale", scale, np.float32), zero)
        return graph.node("Add", steps, _along(graph, quantizer))
    if isinstance(quantizer, (ActivationQuantizer, GroupedQuantizer)):
        axis = None
        scale, zero = quantizer.scale.numpy(), quantizer.zero_point.numpy()
        if isinstance(quantizer, GroupedQuantizer):
            axis, group = -1, quantizer.group.numpy().astype(np.int64)
            scale, zero = scale[group], zero[group]
        codes, _ = uniform_codes(graph, x, scale, zero, bits, axis=axis)
        names = graph.constant("scale", scale, np.float32), graph.constant("zero_point", zero, np.uint8)
        return graph.node("DequantizeLinear", codes, *names, **({} if axis is None else {"axis": axis}))
    if isinstance(quantizer, HybridQuantizer):
        return _hybrid_decoded(graph, x, quantizer)
    raise no_form(quantizer, graph.name)


def _channels_decoded(graph: Stretch, x: str, quantizer: ChannelQuantizer) -> str:
    """clip(round(x / scale), −zero_point, qmax − zero_point) · scale, as the simulation computes it.

    In floating point: QuantizeLinear with a scale for each channel takes many times as long in ONNX Runtime as these
    five sweeps do.
    """
    scale, zero = quantizer.scale.numpy(), quantizer.zero_point.numpy().astype(np.float32)
    shape = (1, -1, 1, 1) if quantizer.maps else (-1,)
    ends = -zero, qmax(quantizer.bits) - zero
    low, high = (graph.constant("end", end.reshape(shape), np.float32) for end in ends)
    scale = graph.constant("scale", scale.reshape(shape), np.float32)
    steps = graph.node("Round", graph.node("Div", x, scale))
    return graph.node("Mul", graph.node("Min", graph.node("Max", steps, low), high), scale)


def _hybrid_decoded(graph: Stretch, x: str, quantizer: HybridQuantizer) -> str:
    """As :func:`carsam.quantizers.hybrid.round_hybrid`, in floating point."""
    (step, split), (log_codes, codes) = quantizer.scale.tolist(), quantizer.zones()

    def number(value: float) -> str:
        return graph.constant("number", value, np.float32)

    above, fraction = _hybrid_zones(graph, x, quantizer)
    uniform = graph.node("Clip", graph.node("Round", graph.node("Div", above, number(step))), number(0), number(codes))
    power = graph.node("Round", graph.node("Div", graph.node("Log", fraction), number(np.log(2.0))))
    alive = graph.node("Clip", graph.node("Add", power, number(log_codes)), number(0), number(1))
    log = graph.node("Mul", graph.node("Pow", number(2.0), power), alive)
    height = graph.node("Add", graph.node("Mul", log, number(split)), graph.node("Mul", uniform, number(step)))
    return graph.node("Add", height, number(float(quantizer.scale[0] * quantizer.offset)))


def no_form(quantizer: nn.Module, site: str) -> ConfigError:
    """The error of a grid that this room does not know."""
    grid = getattr(quantizer, "grid", type(quantizer).__name__)
    return ConfigError(
        f"the grid {grid!r} of {site} has no ONNX form; quantize with another method, or predict with PyTorch "
        "(carsam predict)."
    )


def fits(quantizers: Sequence[nn.Module]) -> bool:
    """Whether all are uniform grids for a whole tensor, as the operands of an integer product must be."""
    return all(isinstance(each, ActivationQuantizer) and each.bits < 16 for each in quantizers)
