"""An exported graph in the QDQ form of ONNX, for runtimes that do not have ONNX Runtime's own operators.

``MatMulIntegerToFloat`` becomes DequantizeLinear of both operands, MatMul and Add: the same numbers on paper, which
OpenVINO and others fuse into their integer kernels. Codes of fewer than 8 bits are clipped as floats before they are
quantized, because a clip between QuantizeLinear and DequantizeLinear keeps the two from being recognised as a pair.
Weights are unpacked to bytes in the file: OpenVINO 2025.2 runs the operations that unpack them at every pass, wrongly.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from carsam.export.graph import OPSET

PRODUCT = "MatMulIntegerToFloat"
UNPACKING = frozenset({"BitShift", "BitwiseAnd", "BitwiseOr", "Concat", "Slice", "Reshape", "Cast"})


def as_qdq(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model in the QDQ form.

    Args:
        model: From an export; every constant of its products is an initializer.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    _unpacked(graph, constants)
    nodes = _plain(graph, constants)
    read = _read(nodes) | {each.name for each in graph.output}
    del graph.initializer[:]
    graph.initializer.extend(tensor for name, tensor in constants.items() if name in read)
    kept = [entry for entry in made.opset_import if not entry.domain]
    del made.opset_import[:]
    made.opset_import.extend(kept)
    return made


def _plain(graph: onnx.GraphProto, constants: dict[str, TensorProto]) -> list[onnx.NodeProto]:
    """Rewrites a graph's nodes in place, and those of the graphs inside them."""
    nodes = _clipped_first(graph, constants)
    plain: list[onnx.NodeProto] = []
    for node in nodes:
        plain += _product(node, constants) if node.op_type == PRODUCT else [node]
    _as_scalars(plain, constants)
    for node in plain:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _plain(attribute.g, constants)
    del graph.node[:]
    graph.node.extend(plain)
    return list(graph.node)


def _read(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Names of the tensors that nodes read, also those that graphs inside them do."""
    found: set[str] = set()
    for node in nodes:
        found.update(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= _read(attribute.g.node) | {each.name for each in attribute.g.output}
    return found


def _unpacked(graph: onnx.GraphProto, constants: dict[str, TensorProto]) -> None:
    """Computes what unpacks weights, in place, and forgets what it was computed from."""
    kept = []
    for node in graph.node:
        if node.op_type not in UNPACKING or not all(name in constants for name in node.input):
            kept.append(node)
            continue
        inputs = {name: numpy_helper.to_array(constants[name]) for name in node.input}
        (value,) = ReferenceEvaluator(node, opsets={"": OPSET}).run(None, inputs)
        constants[node.output[0]] = numpy_helper.from_array(np.ascontiguousarray(value), node.output[0])
    del graph.node[:]
    graph.node.extend(kept)


def _values(constants: dict[str, TensorProto], name: str) -> np.ndarray:
    return numpy_helper.to_array(constants[name]).reshape(-1)


def _as_scalars(nodes: list[onnx.NodeProto], constants: dict[str, TensorProto]) -> None:
    """Gives scales and zero points of one number no dimension: with one they would be those of an axis."""
    for node in nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            for name in node.input[1:3]:
                if list(constants[name].dims) == [1]:
                    constants[name] = numpy_helper.from_array(numpy_helper.to_array(constants[name])[0], name)


def _product(node: onnx.NodeProto, constants: dict[str, TensorProto]) -> list[onnx.NodeProto]:
    """DequantizeLinear of both operands, MatMul, and Add of the bias."""
    left, right, left_scale, right_scale, left_zero, right_zero, *bias = node.input
    name, output = node.name, node.output[0]
    # A scale of one number for every column stands along the last axis.
    columns = {} if len(_values(constants, right_scale)) == 1 else {"axis": 1}
    operands = [f"{name}/left", f"{name}/right"]
    made = [
        helper.make_node("DequantizeLinear", [left, left_scale, left_zero], [operands[0]], name=operands[0]),
        helper.make_node(
            "DequantizeLinear", [right, right_scale, right_zero], [operands[1]], name=operands[1], **columns
        ),
        helper.make_node("MatMul", operands, [f"{name}/product" if bias else output], name=f"{name}/MatMul"),
    ]
    if bias:
        made.append(helper.make_node("Add", [f"{name}/product", bias[0]], [output], name=f"{name}/Add"))
    return made


def _clipped_first(graph: onnx.GraphProto, constants: dict[str, TensorProto]) -> list[onnx.NodeProto]:
    """QuantizeLinear and Clip in the other order, where the clip is all that reads the codes."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {each.name for each in graph.output}
    clips: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        after = readers.get(node.output[0], [])
        alone = node.op_type == "QuantizeLinear" and len(after) == 1 and node.output[0] not in outputs
        if alone and after[0].op_type == "Clip" and len(_values(constants, node.input[1])) == 1:
            clips[node.output[0]] = after[0]
    made: list[onnx.NodeProto] = []
    gone = {clip.name for clip in clips.values()}
    for node in graph.node:
        if node.name in gone:
            continue
        clip = clips.get(node.output[0])
        if clip is None:
            made.append(node)
            continue
        scale, zero = (_values(constants, name)[0] for name in node.input[1:3])
        ends = []
        for which, code in zip(("low", "high"), clip.input[1:3]):
            value = (np.float32(_values(constants, code)[0]) - np.float32(zero)) * scale
            name = f"{node.name}/{which}"
            constants[name] = numpy_helper.from_array(np.asarray(value, np.float32), name)
            ends.append(name)
        made.append(
            helper.make_node("Clip", [node.input[0], *ends], [f"{node.name}/clipped"], name=f"{node.name}/Clip")
        )
        made.append(
            helper.make_node(
                "QuantizeLinear", [f"{node.name}/clipped", *node.input[1:]], [clip.output[0]], name=node.name
            )
        )
    return made
