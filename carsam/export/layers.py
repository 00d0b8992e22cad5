"""A quantized Linear or Conv2d in ONNX: integers where its grids have them, floating point where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from carsam.export.graph import CONTRIB, Stretch
from carsam.export.grids import Terms, decoded, integer_terms
from carsam.export.weights import float_weight, integer_matrix
from carsam.pack.layers import PackedLayer

MATMUL = "MatMulIntegerToFloat"
# The transpose at the end of a convolution.
LAST = "ChannelsFirst"


@dataclass(frozen=True)
class Lowered:
    """How a site came out.

    Attributes:
        site: Module path.
        kind: ``layer`` or ``attention``.
        macs: Multiply-accumulates of one pass over the traced inputs.
        integer_macs: Those in integer kernels.
        reason: Why the others are not.
    """

    site: str
    kind: str
    macs: int
    integer_macs: int
    reason: str = ""


def lower_layer(
    graph: Stretch, layer: nn.Module, x: str, y: str, shapes: tuple[Sequence[int], Sequence[int]]
) -> Lowered:
    """Appends a layer.

    Args:
        graph: Where to; its name is the layer's.
        layer: A ``PackedLayer``, or a ``QuantizedLayer`` whose weights stay in floating point.
        x: Name of the input.
        y: Name that the output must get.
        shapes: Of input and output, as traced (what is dynamic does not matter to a layer).

    Returns:
        How it came out.
    """
    macs = _macs(layer, shapes[1])
    reason = _not_integer(layer)
    terms = None if reason else integer_terms(graph, x, layer.input_quantizer)
    if not reason and terms is None:
        reason = f"the input grid {layer.input_quantizer.grid!r} has no integer codes"
    if reason:
        _lower_float(graph, layer, x, y)
        return Lowered(graph.name, "layer", macs, 0, reason)
    _lower_integer(graph, layer, terms, y, shapes)
    return Lowered(graph.name, "layer", macs, macs)


def _macs(layer: nn.Module, output: Sequence[int]) -> int:
    shape = layer.shape if isinstance(layer, PackedLayer) else tuple(layer.weight.shape)
    return int(np.prod(output)) * int(np.prod(shape[1:]))


def _not_integer(layer: nn.Module) -> str:
    """Why a layer cannot run in integers, whatever its input's grid; empty where it may."""
    if not isinstance(layer, PackedLayer):
        return "its weights are in floating point"
    if layer.input_quantizer.bits >= 16:
        return "its input is in floating point"
    if layer.conv is None:
        return ""
    if layer.conv["groups"] > 1:
        return "ONNX Runtime has no integer kernel for grouped convolutions with a floating-point output"
    grid = layer.input_quantizer.grid
    single = all(size == 1 for size in layer.shape[2:]) and not any(layer.conv["padding"])
    if grid != "uniform" and not (grid == "shifted" and single):
        return f"a convolution's padding must be a code, which the grid {grid!r} does not promise"
    return ""


def _codes(layer: PackedLayer) -> np.ndarray:
    return layer.integer_weight().cpu().numpy()


def _bias(layer: nn.Module) -> np.ndarray | None:
    return None if layer.bias is None else layer.bias.detach().cpu().numpy().astype(np.float32)


def _lower_integer(
    graph: Stretch, layer: PackedLayer, terms: Terms, y: str, shapes: tuple[Sequence[int], Sequence[int]]
) -> None:
    """Sum over the terms of codes @ weights in INT32, scaled to float, with the bias in the last."""
    codes = _codes(layer)
    scale, zero = layer.weight_scale.numpy(), layer.weight_zero_point.numpy()
    # (inputs, outputs), channels last: a convolution's taps lie above one another, each with its channels.
    matrix = (
        codes.reshape(len(codes), -1).T if layer.conv is None else codes.transpose(2, 3, 1, 0).reshape(-1, len(codes))
    )
    bias = _bias(layer)
    if np.any(terms.offset):
        sums = (np.broadcast_to(terms.offset, len(matrix)) @ (matrix.astype(np.float64) - zero)) * scale
        bias = (sums if bias is None else sums + bias).astype(np.float32)

    convolution = layer.conv is not None
    total, whole = "", None
    for index, term in enumerate(terms.terms):
        last = index == len(terms.terms) - 1
        rows = matrix if term.channels is None else matrix[term.channels]
        if term.channels is None and whole is not None:
            weight, weight_zero = whole
        else:
            weight, weight_zero = integer_matrix(graph, rows, zero, layer.weight_bits)
            whole = (weight, weight_zero) if term.channels is None else None
        patches = _patches(graph, layer, term.codes, term.zero_point, shapes) if convolution else term.codes
        inputs = [
            patches,
            weight,
            graph.constant("input_scale", term.scale, np.float32),
            graph.constant("weight_scale", scale, np.float32),
            graph.constant("input_zero_point", term.zero_point, np.uint8),
            weight_zero,
        ]
        if last and bias is not None:
            inputs.append(graph.constant("bias", bias, np.float32))
        alone = len(terms.terms) == 1 and not convolution
        product = graph.node(MATMUL, *inputs, domain=CONTRIB, outputs=[y] if alone else 1)
        if total:
            product = graph.node("Add", total, product, outputs=[y] if last and not convolution else 1)
        total = product
    if convolution:
        graph.node("Transpose", total, perm=[0, 3, 1, 2], outputs=[y], name=LAST)


def _patches(
    graph: Stretch, layer: PackedLayer, codes: str, zero_point: int, shapes: tuple[Sequence[int], Sequence[int]]
) -> str:
    """What every output pixel reads, side by side: (B, C, H, W) codes to (B, H', W', taps · C).

    Bytes are moved, not computed: a product of matrices then does the convolution in integers, which ONNX Runtime's
    own ConvInteger would only do without a zero point a channel.
    """
    conv = layer.conv
    codes = graph.node("Transpose", codes, perm=[0, 2, 3, 1])
    (top, left), kernel = conv["padding"], layer.shape[2:]
    if top or left:
        pads = graph.constant("pads", [0, top, left, 0, 0, top, left, 0], np.int64)
        codes = graph.node("Pad", codes, pads, graph.constant("pad", zero_point, np.uint8))
    if kernel == (1, 1) and tuple(conv["stride"]) == (1, 1):
        return codes
    height, width = shapes[1][2:]
    taps = []
    axes = graph.constant("axes", [1, 2], np.int64)
    steps = graph.constant("steps", conv["stride"], np.int64)
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            start = [row * conv["dilation"][0], column * conv["dilation"][1]]
            end = [start[0] + (height - 1) * conv["stride"][0] + 1, start[1] + (width - 1) * conv["stride"][1] + 1]
            ends = [graph.constant("end", value, np.int64) for value in (start, end)]
            taps.append(graph.node("Slice", codes, *ends, axes, steps))
    return graph.node("Concat", *taps, axis=-1) if len(taps) > 1 else taps[0]


def _lower_float(graph: Stretch, layer: nn.Module, x: str, y: str) -> None:
    """Decoded input times decoded weights; packed weights are decoded when the file is loaded."""
    x = decoded(graph, x, layer.input_quantizer)
    if isinstance(layer, PackedLayer):
        scale, zero = layer.weight_scale.numpy(), layer.weight_zero_point.numpy()
        weight = float_weight(graph, _codes(layer), scale, zero, layer.weight_bits)
    else:
        weight = graph.constant("weight", layer.weight.detach().cpu().to(torch.float32).numpy())
    bias = _bias(layer)
    if layer.conv is None:
        weight = graph.node("Transpose", weight, perm=[1, 0])
        product = graph.node("MatMul", x, weight, outputs=[y] if bias is None else 1)
        if bias is not None:
            graph.node("Add", product, graph.constant("bias", bias), outputs=[y])
        return
    conv = layer.conv
    inputs = [x, weight] + ([graph.constant("bias", bias)] if bias is not None else [])
    graph.node(
        "Conv",
        *inputs,
        outputs=[y],
        strides=list(conv["stride"]),
        pads=[*conv["padding"], *conv["padding"]],
        dilations=list(conv["dilation"]),
        group=conv["groups"],
    )
