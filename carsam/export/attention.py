"""The two MatMuls of a quantized attention in ONNX.

QKᵀ and PV run in integers where all of their operands have codes: uniform grids for Q, K and V, and for P the uniform
grid or codes relative to the row's maximum. The second operand is signed, which ONNX Runtime's kernels want. The
logarithmic grids of P (log2, log1p) have no integer codes of 8 bits: P̂ is decoded and multiplied in floating point.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from onnx import TensorProto

from carsam.export.graph import CONTRIB, Stretch
from carsam.export.grids import decoded, fits, no_form, uniform_codes
from carsam.export.layers import MATMUL, Lowered
from carsam.models.attention import MatMulQuantizers
from carsam.quantizers import ActivationQuantizer, Log1pSoftmax, Log2Softmax, RowMaximumSoftmax, UniformSoftmax
from carsam.quantizers.affine import qmax


@dataclass(frozen=True)
class Call:
    """One call of an attention, as traced.

    Attributes:
        query, key, value: Names of tensors (..., tokens, dim) of ``rank`` dimensions.
        output: Name that the output must get.
        scaling: Factor of the scores.
        shapes: Of query, key and value, as traced.
        mask: Name of what is added to the scores, or empty.
        relative: Names of what is added for row and column of the key, or empty.
        sides: Rows and columns of the key's map, and 0 without relative positions.
    """

    query: str
    key: str
    value: str
    output: str
    scaling: float
    shapes: tuple[tuple[int, ...], ...]
    mask: str = ""
    relative: tuple[str, ...] = ()
    sides: tuple[int, int] = (0, 0)

    @property
    def rank(self) -> int:
        return len(self.shapes[0])


def lower_attention(graph: Stretch, matmul: MatMulQuantizers, call: Call) -> Lowered:
    """Appends the core of an attention, between the projections and the output's projection."""
    query, key, value = call.shapes
    pairs = int(np.prod(query[:-1])) * key[-2]
    macs = pairs * (query[-1] + value[-1])
    scores, first = _scores(graph, matmul, call)
    scores = _with_bias(graph, call, scores)
    reason = "" if first else "Q or K has no integer codes"
    integer = pairs * query[-1] if first else 0
    second = _product(graph, matmul, call, scores)
    if second:
        reason = f"{reason}; {second}" if reason else second
    else:
        integer += pairs * value[-1]
    return Lowered(graph.name, "attention", macs, integer, reason)


def _transposed(graph: Stretch, x: str, rank: int) -> str:
    return graph.node("Transpose", x, perm=[*range(rank - 2), rank - 1, rank - 2])


def _scores(graph: Stretch, matmul: MatMulQuantizers, call: Call) -> tuple[str, bool]:
    """Q̂K̂ᵀ times the factor, and whether in integers."""
    if fits([matmul.query, matmul.key]):
        query, key = matmul.query, matmul.key
        left, _ = uniform_codes(graph, call.query, float(query.scale), int(query.zero_point), query.bits)
        right, shift = uniform_codes(graph, call.key, float(key.scale), int(key.zero_point), key.bits, signed=True)
        scale = float(query.scale) * call.scaling
        inputs = (
            graph.constant("query_scale", scale, np.float32),
            graph.constant("key_scale", float(key.scale), np.float32),
            graph.constant("query_zero_point", int(query.zero_point), np.uint8),
            graph.constant("key_zero_point", int(key.zero_point) - shift, np.int8),
        )
        right = _transposed(graph, right, call.rank)
        return graph.node(MATMUL, left, right, *inputs, domain=CONTRIB, name="scores"), True
    left, right = decoded(graph, call.query, matmul.query), decoded(graph, call.key, matmul.key)
    left = graph.node("Mul", left, graph.constant("scaling", call.scaling, np.float32))
    return graph.node("MatMul", left, _transposed(graph, right, call.rank), name="scores"), False


def _with_bias(graph: Stretch, call: Call, scores: str) -> str:
    """Adds the mask, or relative positions by two broadcasts: the full bias is never built."""
    if call.mask:
        scores = graph.node("Add", scores, call.mask)
    if call.relative:
        (height, width), lead, queries = call.sides, list(call.shapes[0][:-2]), call.shapes[0][-2]
        rows, columns = call.relative
        apart = graph.constant("apart", [*lead, queries, height, width], np.int64)
        scores = graph.node("Reshape", scores, apart)
        by_row = graph.constant("by_row", [*lead, queries, height, 1], np.int64)
        by_column = graph.constant("by_column", [*lead, queries, 1, width], np.int64)
        scores = graph.node("Add", scores, graph.node("Reshape", rows, by_row))
        scores = graph.node("Add", scores, graph.node("Reshape", columns, by_column))
        scores = graph.node("Reshape", scores, graph.constant("whole", [*lead, queries, height * width], np.int64))
    return scores


def _product(graph: Stretch, matmul: MatMulQuantizers, call: Call, scores: str) -> str:
    """P̂V̂ of scores; gives why it is not in integers, or nothing."""
    probs = matmul.probs
    integer_value = fits([matmul.value])
    if isinstance(probs, RowMaximumSoftmax) and probs.bits < 16:
        return _row_maximum(graph, matmul, call, scores, integer_value)
    soft = graph.node("Softmax", scores, axis=-1)
    if isinstance(probs, UniformSoftmax) and integer_value and probs.bits < 16:
        quantizer = probs.quantizer
        scale, zero = float(quantizer.scale), int(quantizer.zero_point)
        codes, _ = uniform_codes(graph, soft, scale, zero, quantizer.bits)
        _integer_product(graph, matmul.value, call, codes, scale, zero, [call.output])
        return ""
    value = decoded(graph, call.value, matmul.value)
    graph.node("MatMul", _decoded_probabilities(graph, soft, probs), value, outputs=[call.output], name="output")
    if probs.bits >= 16 or not integer_value:
        return "P or V has no integer codes"
    return f"the grid {probs.grid!r} of P has no integer codes"


def _integer_product(
    graph: Stretch,
    quantizer: ActivationQuantizer,
    call: Call,
    codes: str,
    scale: float,
    zero_point: int,
    outputs: list[str] | int = 1,
) -> str:
    value, shift = uniform_codes(
        graph, call.value, float(quantizer.scale), int(quantizer.zero_point), quantizer.bits, signed=True
    )
    inputs = (
        graph.constant("probability_scale", scale, np.float32),
        graph.constant("value_scale", float(quantizer.scale), np.float32),
        graph.constant("probability_zero_point", zero_point, np.uint8),
        graph.constant("value_zero_point", int(quantizer.zero_point) - shift, np.int8),
    )
    return graph.node(MATMUL, codes, value, *inputs, domain=CONTRIB, outputs=outputs, name="output")


def _row_maximum(graph: Stretch, matmul: MatMulQuantizers, call: Call, scores: str, integer_value: bool) -> str:
    """Codes round(qmax · exp(S − max S)); the product is divided by their sum, which is exact.

    The division falls on the small output instead of on P: P̂V̂ = (codes · V̂) / Σ codes.
    """
    axes = graph.constant("last", [-1], np.int64)
    weights = graph.node("Exp", graph.node("Sub", scores, graph.node("ReduceMax", scores, axes, keepdims=1)))
    step = 1.0 / qmax(matmul.probs.bits)
    codes = graph.node(
        "QuantizeLinear", weights, graph.constant("step", step, np.float32), graph.constant("zero", 0, np.uint8)
    )
    floats = graph.node("Cast", codes, to=TensorProto.FLOAT)
    total = graph.node("ReduceSum", floats, axes, keepdims=1)
    if integer_value:
        product = _integer_product(graph, matmul.value, call, codes, 1.0, 0)
    else:
        product = graph.node("MatMul", floats, decoded(graph, call.value, matmul.value), name="output")
    graph.node("Div", product, total, outputs=[call.output])
    return "" if integer_value else "V has no integer codes"


def _decoded_probabilities(graph: Stretch, soft: str, probs: object) -> str:
    """P̂ in floating point, by the formulas of the grids."""

    def number(value: float) -> str:
        return graph.constant("number", value, np.float32)

    if probs.bits >= 16:
        return soft
    if isinstance(probs, UniformSoftmax):
        return decoded(graph, soft, probs.quantizer)
    if isinstance(probs, Log2Softmax):
        share = graph.node("Max", graph.node("Div", soft, number(float(probs.scale))), number(1e-30))
        code = graph.node("Mul", graph.node("Log", share), number(-int(probs.tau) / np.log(2.0)))
        return _looked_up(graph, code, probs, probs.zero)
    if isinstance(probs, Log1pSoftmax):
        curve = float(probs.curve)
        share = graph.node("Clip", graph.node("Div", soft, number(float(probs.scale))), number(0), number(1))
        raised = graph.node("Mul", share, number(curve))
        # ln(1 + z) = 2 artanh(z / (2 + z)), which keeps its digits where z is small.
        raised = graph.node("Atanh", graph.node("Div", raised, graph.node("Add", raised, number(2))))
        return _looked_up(graph, graph.node("Mul", raised, number(2 * probs.top / np.log1p(curve))), probs, probs.top)
    raise no_form(probs, graph.name)


def _looked_up(graph: Stretch, code: str, probs: Log2Softmax | Log1pSoftmax, top: int) -> str:
    """The values of codes that are still to be rounded and clipped."""
    ends = [graph.constant("end", value, np.float32) for value in (0, top)]
    code = graph.node("Cast", graph.node("Clip", graph.node("Round", code), *ends), to=TensorProto.INT32)
    table = probs.decode(torch.arange(top + 1)).numpy()
    return graph.node("Gather", graph.constant("table", table, np.float32), code)
