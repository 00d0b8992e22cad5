"""The two MatMuls of a quantized attention in ONNX.

QKᵀ and PV run in integers where all of their operands have codes: uniform grids for Q, K and V, and for P the uniform
grid or codes relative to the row's maximum. The second operand is signed, which ONNX Runtime's kernels want. The
logarithmic grids of P (log2, log1p) have no integer codes of 8 bits: P̂ is decoded and multiplied in floating point.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from onnx import TensorProto, helper

from carsam.export.graph import CONTRIB, Stretch
from carsam.export.grids import decoded, fits, no_form, uniform_codes
from carsam.export.layers import MATMUL, Lowered
from carsam.models.attention import MatMulQuantizers
from carsam.quantizers import ActivationQuantizer, Log1pSoftmax, Log2Softmax, RowMaximumSoftmax, UniformSoftmax
from carsam.quantizers.affine import qmax

# Scores of a part of an attention: 4 MB, which stay in a processor's cache between the operations on them.
PART = 2**20
# And where parts stand one after the other in the graph, for readers that know no loops: 64 MB, so that there are few.
UNROLLED_PART = 2**24


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


def lower_attention(graph: Stretch, matmul: MatMulQuantizers, call: Call, *, loops: bool = True) -> Lowered:
    """Appends the core of an attention, between the projections and the output's projection.

    Args:
        graph: Where to; its name is the attention's.
        matmul: Its quantizers.
        call: As traced.
        loops: Whether a large attention may run part by part in a loop; otherwise its parts, which are larger, stand
            one after the other.

    Returns:
        How it came out.
    """
    query, key, value = call.shapes
    # A map of the image has a fixed size, so its attention can be cut.
    parts = _parts(call, PART if loops else UNROLLED_PART) if call.relative else None
    if parts is None:
        _attend_whole(graph, matmul, call)
    elif loops:
        _attend_in_parts(graph, matmul, Operands.encoded(graph, matmul, call), call, parts)
    else:
        _attend_unrolled(graph, matmul, call, parts)
    pairs = int(np.prod(query[:-1])) * key[-2]
    first = pairs * query[-1] if fits([matmul.query, matmul.key]) else 0
    reason = "" if first else "Q or K has no integer codes"
    second = _not_integer(matmul)
    reason = f"{reason}; {second}" if reason and second else reason or second
    return Lowered(
        graph.name,
        "attention",
        pairs * (query[-1] + value[-1]),
        first + (0 if second else pairs * value[-1]),
        reason,
    )


@dataclass(frozen=True)
class Operands:
    """What the two products read: codes, or decoded values.

    Attributes:
        query: Name of Q's codes (uint8), or of Q̂ times the factor.
        key: Name of K's codes, transposed (int8), or of K̂ᵀ.
        value: Name of V's codes (int8), or of V̂.
        integer_scores: Whether QKᵀ is of codes.
        integer_value: Whether V is codes.
    """

    query: str
    key: str
    value: str
    integer_scores: bool
    integer_value: bool

    @classmethod
    def encoded(cls, graph: Stretch, matmul: MatMulQuantizers, call: Call) -> Operands:
        """Appends what makes them."""
        scores, value = fits([matmul.query, matmul.key]), _not_integer(matmul) == ""
        if scores:
            query = _codes(graph, call.query, matmul.query, signed=False)
            key = _codes(graph, call.key, matmul.key, signed=True)
        else:
            query = decoded(graph, call.query, matmul.query)
            query = graph.node("Mul", query, graph.constant("scaling", call.scaling, np.float32))
            key = decoded(graph, call.key, matmul.key)
        key = graph.node("Transpose", key, perm=[*range(call.rank - 2), call.rank - 1, call.rank - 2])
        if value:
            return cls(query, key, _codes(graph, call.value, matmul.value, signed=True), scores, True)
        return cls(query, key, decoded(graph, call.value, matmul.value), scores, False)


def _codes(graph: Stretch, x: str, quantizer: ActivationQuantizer, *, signed: bool) -> str:
    scale, zero = float(quantizer.scale), int(quantizer.zero_point)
    return uniform_codes(graph, x, scale, zero, quantizer.bits, signed=signed)[0]


def _not_integer(matmul: MatMulQuantizers) -> str:
    """Why P̂V̂ is not in integers; empty where it is."""
    probs = matmul.probs
    if probs.bits >= 16 or not fits([matmul.value]):
        return "P or V has no integer codes"
    if isinstance(probs, (RowMaximumSoftmax, UniformSoftmax)):
        return ""
    return f"the grid {probs.grid!r} of P has no integer codes"


def _product(
    graph: Stretch,
    left: str,
    right: str,
    left_grid: tuple[float, int],
    right_quantizer: ActivationQuantizer,
    name: str,
    out: str = "",
) -> str:
    """Codes times signed codes, scaled to float."""
    shift = 128 if right_quantizer.bits == 8 else 0
    inputs = (
        graph.constant("left_scale", left_grid[0], np.float32),
        graph.constant("right_scale", float(right_quantizer.scale), np.float32),
        graph.constant("left_zero_point", left_grid[1], np.uint8),
        graph.constant("right_zero_point", int(right_quantizer.zero_point) - shift, np.int8),
    )
    return graph.node(MATMUL, left, right, *inputs, domain=CONTRIB, name=name, outputs=[out] if out else 1)


def _placed(graph: Stretch, call: Call, lead: list[int]) -> tuple[str, ...]:
    """Relative positions as they broadcast over the key's map: (*lead, rows, 1) and (*lead, 1, columns)."""
    if not call.relative:
        return ()
    places = [*lead, call.sides[0], 1], [*lead, 1, call.sides[1]]
    return tuple(
        graph.node("Reshape", x, graph.constant("place", place, np.int64)) for x, place in zip(call.relative, places)
    )


def _attend_whole(graph: Stretch, matmul: MatMulQuantizers, call: Call) -> None:
    """Operands, and all queries at once."""
    operands, lead = Operands.encoded(graph, matmul, call), [*call.shapes[0][:-1]]
    _attend(graph, matmul, operands, call, _placed(graph, call, lead), lead, call.output)


def _attend(
    graph: Stretch,
    matmul: MatMulQuantizers,
    operands: Operands,
    call: Call,
    relative: tuple[str, ...],
    lead: list[int],
    out: str,
) -> None:
    """Scores, bias, softmax and the second product of some queries; ``lead`` is their shape, (..., queries)."""
    if operands.integer_scores:
        grid = float(matmul.query.scale) * call.scaling, int(matmul.query.zero_point)
        scores = _product(graph, operands.query, operands.key, grid, matmul.key, "scores")
    else:
        scores = graph.node("MatMul", operands.query, operands.key, name="scores")
    if call.mask:
        scores = graph.node("Add", scores, call.mask)
    if relative:
        # Two broadcasts: the full bias is never built.
        apart = graph.constant("apart", [*lead, *call.sides], np.int64)
        scores = graph.node("Reshape", scores, apart)
        for each in relative:
            scores = graph.node("Add", scores, each)
        scores = graph.node("Reshape", scores, graph.constant("whole", [*lead, call.shapes[1][-2]], np.int64))
    probs = matmul.probs
    if isinstance(probs, RowMaximumSoftmax) and probs.bits < 16:
        _row_maximum(graph, matmul, operands, scores, out)
        return
    soft = graph.node("Softmax", scores, axis=-1)
    if not operands.integer_value:
        values = _decoded_probabilities(graph, soft, probs)
        graph.node("MatMul", values, operands.value, outputs=[out], name="output")
        return
    scale, zero = float(probs.quantizer.scale), int(probs.quantizer.zero_point)
    codes, _ = uniform_codes(graph, soft, scale, zero, probs.bits)
    _product(graph, codes, operands.value, (scale, zero), matmul.value, "output", out)


def _row_maximum(graph: Stretch, matmul: MatMulQuantizers, operands: Operands, scores: str, out: str) -> None:
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
    if operands.integer_value:
        product = _product(graph, codes, operands.value, (1.0, 0), matmul.value, "output")
    else:
        product = graph.node("MatMul", floats, operands.value, name="output")
    graph.node("Div", product, total, outputs=[out])


def _parts(call: Call, most: int) -> tuple[int, int] | None:
    """Heads and queries of a part with at most so many scores; None where one part is all."""
    heads, queries, keys = call.shapes[0][0], call.shapes[0][-2], call.shapes[1][-2]
    if heads * queries * keys <= most:
        return None
    if queries * keys <= most:
        several = max(n for n in range(1, heads + 1) if heads % n == 0 and n * queries * keys <= most)
        return several, queries
    return 1, max([n for n in range(1, queries + 1) if queries % n == 0 and n * keys <= most], default=1)


def _attend_in_parts(
    graph: Stretch, matmul: MatMulQuantizers, operands: Operands, call: Call, parts: tuple[int, int]
) -> None:
    """The same, part by part in a loop: scores of an attention over a whole image are swept over in memory otherwise.

    The operator Scan hands out the parts of Q and of the relative positions. Where a head is cut, its K and V are taken
    by the number of the head.
    """
    (heads, queries), (height, width) = parts, call.sides
    all_heads, all_queries, dim = call.shapes[0]
    keys, out_dim = call.shapes[1][-2], call.shapes[2][-1]
    count = all_heads * all_queries // (heads * queries)
    body = Stretch(graph.name, "part.")

    def cut(x: str, *shape: int) -> str:
        return graph.node("Reshape", x, graph.constant("cut", [count, *shape], np.int64))

    quantized = TensorProto.UINT8 if operands.integer_scores else TensorProto.FLOAT
    lead = [heads, queries]
    slices = [("query", cut(operands.query, *lead, dim), quantized, [*lead, dim])]
    places = [*lead, height, 1], [*lead, 1, width]
    for name, x, place in zip(("rows", "columns"), call.relative, places):
        slices.append((name, cut(x, *place), TensorProto.FLOAT, place))
    if queries == all_queries:
        signed = {True: TensorProto.INT8, False: TensorProto.FLOAT}
        key = cut(operands.key, heads, dim, keys), signed[operands.integer_scores], [heads, dim, keys]
        value = cut(operands.value, heads, keys, out_dim), signed[operands.integer_value], [heads, keys, out_dim]
        slices += [("key", *key), ("value", *value)]
    else:
        number = np.repeat(np.arange(all_heads), count // all_heads)
        slices.append(("head", graph.constant("heads", number, np.int64), TensorProto.INT64, []))
    named = {name: f"{graph.name}/part.{name}" for name, *_ in slices}
    if queries == all_queries:
        key, value = named["key"], named["value"]
    else:
        key, value = (body.node("Gather", x, named["head"], axis=0) for x in (operands.key, operands.value))
    inside = Operands(named["query"], key, value, operands.integer_scores, operands.integer_value)
    result = f"{graph.name}/part.result"
    _attend(body, matmul, inside, call, (named["rows"], named["columns"]), lead, result)
    graph.constants += body.constants
    loop = helper.make_graph(
        body.nodes,
        f"{graph.name}/part",
        [helper.make_tensor_value_info(named[name], kind, shape) for name, _, kind, shape in slices],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, [*lead, out_dim])],
    )
    found = graph.node("Scan", *(x for _, x, *_ in slices), body=loop, num_scan_inputs=len(slices))
    shape = graph.constant("together", [all_heads, all_queries, out_dim], np.int64)
    graph.node("Reshape", found, shape, outputs=[call.output])


def _attend_unrolled(graph: Stretch, matmul: MatMulQuantizers, call: Call, parts: tuple[int, int]) -> None:
    """The same, every part an attention of its own; values are cut before they become codes.

    Readers of the QDQ form recognise a quantizer only where its codes are decoded right behind it.
    """
    (heads, queries), (query, key, value) = parts, call.shapes

    def cut(x: str, axis: int, start: int, count: int) -> str:
        ends = [graph.constant("end", [number], np.int64) for number in (start, start + count)]
        return graph.node("Slice", x, *ends, graph.constant("axis", [axis], np.int64))

    places = [graph.constant("place", [*query[:-1], side], np.int64) for side in call.sides]
    biases = [graph.node("Reshape", x, place) for x, place in zip(call.relative, places)]
    several: list[str] = []
    for head in range(0, query[0], heads):
        mine = [cut(x, 0, head, heads) for x in (call.query, call.key, call.value, *biases)]
        results: list[str] = []
        for start in range(0, query[-2], queries):
            first, *relative = mine[0], *mine[3:]
            if queries < query[-2]:
                first, *relative = (cut(x, 1, start, queries) for x in (first, *relative))
            results.append(f"{graph.name}/part.{head}.{start}")
            shapes = (heads, queries, query[-1]), (heads, *key[1:]), (heads, *value[1:])
            names = {"query": first, "key": mine[1], "value": mine[2], "relative": tuple(relative)}
            _attend_whole(graph, matmul, replace(call, **names, output=results[-1], shapes=shapes))
        several.append(graph.node("Concat", *results, axis=1) if len(results) > 1 else results[0])
    graph.node("Concat", *several, axis=0, outputs=[call.output])


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
