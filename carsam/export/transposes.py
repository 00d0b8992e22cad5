"""Transposes moved behind a quantizer, where they move a quarter of the bytes.

A convolution in integers gives its map with channels last, and what follows in the traced graph wants channels first:
an activation, then the next layer's quantizer. Element by element both are the same in any order, so it may wait
until the values are codes. Before a convolution in floating point it waits until the end: ONNX Runtime reorders that
one's input anyway, from either order.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import helper, numpy_helper

# Operators that treat each element by itself, where their other inputs are single numbers, or one for each channel.
ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Max", "Min", "Round", "Erf", "Relu", "Sigmoid", "Tanh", "Clip", "QuantizeLinear"}
)

# Of the name of a constant that has a number for each channel, where channels come last.
LAST = "/last"


def sunk(
    nodes: Sequence[onnx.NodeProto],
    constants: list[onnx.TensorProto],
    outputs: Sequence[str],
    names: Sequence[str],
) -> list[onnx.NodeProto]:
    """Nodes with some transposes moved behind the quantizers, or before the convolutions, that alone read their values.

    Args:
        nodes: In the order of execution.
        constants: Of the graph; numbers for each channel come in with channels last where they are read so.
        outputs: Names of the graph's outputs.
        names: Names of the transposes' nodes to move.

    Returns:
        The nodes, in an order of execution; a transpose whose values others read as floats stays where it is.
    """
    single = {tensor.name for tensor in constants if _is_single(tensor)}
    for node in nodes:
        if node.op_type == "Constant" and any(a.name == "value" and _is_single(a.t) for a in node.attribute):
            single.add(node.output[0])
    channels = {tensor.name: tensor for tensor in constants if _is_of_channels(tensor)}
    result, wanted = list(nodes), set(names)
    for transpose in [node for node in nodes if node.name in wanted]:
        result = _sink(result, transpose, single, set(channels), set(outputs))
    # Numbers for each channel follow their readers.
    last = {name for node in result for name in node.input if name.endswith(LAST)}
    for name, tensor in channels.items():
        if f"{name}{LAST}" in last:
            values = numpy_helper.to_array(tensor).reshape(1, 1, 1, -1)
            constants.append(numpy_helper.from_array(values, f"{name}{LAST}"))
    return result


def _is_single(tensor: onnx.TensorProto) -> bool:
    return all(size == 1 for size in tensor.dims)


def _is_of_channels(tensor: onnx.TensorProto) -> bool:
    sizes = list(tensor.dims)
    return len(sizes) == 4 and sizes[0] == sizes[2] == sizes[3] == 1 < sizes[1]


def _sink(
    nodes: list[onnx.NodeProto], transpose: onnx.NodeProto, single: set[str], channels: set[str], outputs: set[str]
) -> list[onnx.NodeProto]:
    source, target = transpose.input[0], transpose.output[0]
    # Values that are the same as in the graph but for the transpose, which of them are codes, and which are read by
    # others than convolutions.
    values, codes, read_elsewhere = {target}, set(), set()
    region: list[onnx.NodeProto] = []
    read_outside = set(values & outputs)
    for node in nodes:
        inside = values & set(node.input)
        if not inside:
            continue
        others = {name for name in node.input if name} - values - single - channels
        if node.op_type in ELEMENTWISE and not others and len(node.output) == 1:
            region.append(node)
            values.add(node.output[0])
            if node.op_type == "QuantizeLinear" or (node.op_type == "Clip" and node.input[0] in codes):
                codes.add(node.output[0])
        else:
            read_outside |= inside
            if node.op_type != "Conv":
                read_elsewhere |= inside
    read_outside |= values & outputs
    read_elsewhere |= values & outputs
    if not read_outside or target in read_outside or not read_elsewhere <= codes:
        return nodes
    members = {id(node) for node in region}
    moved: list[onnx.NodeProto] = []
    for node in nodes:
        if node is transpose:
            continue
        if id(node) not in members:
            moved.append(node)
            continue
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        for index, name in enumerate(node.input):
            if name == target:
                changed.input[index] = source
            elif name in read_outside:
                changed.input[index] = f"{name}/before"
            elif name in channels:
                changed.input[index] = f"{name}{LAST}"
        name = node.output[0]
        if name in read_outside:
            changed.output[0] = f"{name}/before"
        moved.append(changed)
        if name in read_outside:
            perm = list(helper.get_node_attr_value(transpose, "perm"))
            moved.append(helper.make_node("Transpose", [f"{name}/before"], [name], name=f"{name}/after", perm=perm))
    return moved
