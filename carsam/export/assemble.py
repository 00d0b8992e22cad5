"""A core graph with what a tool wants around it: names, preparation of inputs, and what becomes of outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx
from onnx import TensorProto, helper

from carsam.export.graph import Stretch, model_of, renamed
from carsam.export.trace import Half

Shape = Sequence[int | str]


@dataclass
class Around:
    """The surroundings of a core.

    Attributes:
        inputs: Of the file: names to shapes; float32 unless ``types`` says otherwise.
        outputs: Likewise.
        before: Nodes that make the core's inputs.
        after: Nodes that make the file's outputs.
        names: Names of the core's tensors to names in the file.
        types: ONNX types of inputs that are not float32.
    """

    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    before: Stretch = field(default_factory=lambda: Stretch("before"))
    after: Stretch = field(default_factory=lambda: Stretch("after"))
    names: Mapping[str, str] = field(default_factory=dict)
    types: Mapping[str, int] = field(default_factory=dict)


def assemble(half: Half, around: Around, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """The file of a core with its surroundings.

    Args:
        half: The core; it is copied.
        around: What stands around it.
        metadata: Of the file.
    """
    graph = onnx.GraphProto()
    graph.name = half.graph.name
    graph.node.extend(around.before.nodes)
    core = onnx.GraphProto()
    core.node.extend(half.graph.node)
    renamed(core.node, around.names)
    graph.node.extend(core.node)
    graph.node.extend(around.after.nodes)
    for constants in (half.graph.initializer, around.before.constants, around.after.constants):
        graph.initializer.extend(constants)

    def described(tensors: Mapping[str, Shape]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(name, around.types.get(name, TensorProto.FLOAT), list(shape))
            for name, shape in tensors.items()
        ]

    graph.input.extend(described(around.inputs))
    graph.output.extend(described(around.outputs))
    return model_of(graph, metadata)
