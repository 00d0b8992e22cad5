"""A stretch of an ONNX graph under construction, with names of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

CONTRIB = "com.microsoft"
# 18 has the bit operations that unpack weights, and is what segment-anything's and samexporter's own exports use.
OPSET, IR_VERSION = 18, 9
DOMAINS = {"": OPSET, CONTRIB: 1}


class Stretch:
    """Nodes and constants that are appended; every name starts with the site's.

    Args:
        name: Module path of the site.
        prefix: Of what is named, where a site has several stretches.
    """

    def __init__(self, name: str, prefix: str = ""):
        self.name, self.prefix = name, prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._used: dict[str, int] = {}

    def _fresh(self, what: str) -> str:
        count = self._used.get(what, 0)
        self._used[what] = count + 1
        return f"{self.name}/{self.prefix}{what}" + (f".{count}" if count else "")

    def constant(self, what: str, value: Any, dtype: Any = None) -> str:
        """A constant; gives its name."""
        name = self._fresh(what)
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(np.asarray(value, dtype=dtype)), name))
        return name

    def node(
        self,
        op: str,
        *inputs: str,
        domain: str = "",
        outputs: Sequence[str] | int = 1,
        name: str = "",
        **attributes: Any,
    ) -> Any:
        """Appends a node; gives the name of its output, or the list of them where there are several.

        Args:
            op: Operator.
            inputs: Names of tensors; empty for an optional one that is left out.
            domain: Of the operator.
            outputs: Names, or how many.
            name: Of the node; the operator's otherwise.
            attributes: Of the node.
        """
        name = self._fresh(name or op)
        if isinstance(outputs, int):
            names = [f"{name}:{i}" if i else f"{name}:" for i in range(outputs)]
        else:
            names = list(outputs)
        self.nodes.append(helper.make_node(op, list(inputs), names, name=name, domain=domain, **attributes))
        return names[0] if len(names) == 1 else names


def text_graph(text: str, values: Mapping[str, Any] | None = None) -> onnx.GraphProto:
    """A graph from ONNX's textual form; ``values`` are constants that it names without giving them."""
    graph = onnx.parser.parse_graph(text)
    for name, value in (values or {}).items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return graph


def renamed(nodes: Sequence[onnx.NodeProto], names: Mapping[str, str]) -> None:
    """Renames tensors, in place, in nodes and the graphs inside them."""
    for node in nodes:
        for field in (node.input, node.output):
            for index, name in enumerate(field):
                if name in names:
                    field[index] = names[name]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                renamed(attribute.g.node, names)


def model_of(graph: onnx.GraphProto, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """The model file of a graph, with metadata."""
    opsets = [helper.make_opsetid(domain, version) for domain, version in DOMAINS.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="carsam")
    helper.set_model_props(model, dict(metadata))
    return model
