"""A model's halves as ONNX graphs: traced with marks, and the marks filled in."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from carsam.export.attention import Call, lower_attention
from carsam.export.graph import OPSET, Stretch
from carsam.export.layers import LAST, Lowered, lower_layer
from carsam.export.markers import ATTENTION, DOMAIN, marked
from carsam.export.transposes import sunk
from carsam.models.attention import MatMulQuantizers
from carsam.models.family import Family

# Smaller floating-point constants are kept as they are.
HALF_ELEMENTS = 256
# Points of a traced prompt; their number is free in the graph.
POINTS = 3


@dataclass(frozen=True)
class Half:
    """A graph with how its quantized sites came out, in the order of execution."""

    graph: onnx.GraphProto
    lowered: tuple[Lowered, ...]


@dataclass(frozen=True)
class Core:
    """Both halves without anything around them.

    Attributes:
        encoder: ``pixel_values`` (1, 3, S, S) to the tensors named ``names``.
        decoder: These and ``points`` (B, N, 2), ``labels`` (B, N), ``mask`` (M, 1, h, w), ``has_mask`` (1,) to
            ``logits`` (B, K, h, w) and ``iou`` (B, K).
        names: Of the tensors between.
        shapes: Of these tensors.
        side: S.
        low_res: Side of a mask.
    """

    encoder: Half
    decoder: Half
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    side: int
    low_res: int


@dataclass(frozen=True)
class Marked:
    """Both halves as traced, with marks in the places of quantized sites.

    Attributes:
        encoder, decoder: Graphs; inputs and outputs as those of :class:`Core`.
        sites: What stands in the places, by module path.
        names, shapes, side, low_res: As those of :class:`Core`.
    """

    encoder: onnx.GraphProto
    decoder: onnx.GraphProto
    sites: Mapping[str, nn.Module]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    side: int
    low_res: int


@torch.no_grad()
def trace(model: nn.Module, family: Family, *, loops: bool = True) -> Core:
    """Traces both halves of a model.

    Args:
        model: Packed or float, on the CPU.
        family: Its family.
        loops: Whether large attentions may run part by part in loops.

    Raises:
        ConfigError: The family gives no halves; a grid has no ONNX form.
    """
    found = trace_marks(model, family)
    packed = any(not isinstance(site, MatMulQuantizers) for site in found.sites.values())
    parts = [
        _filled(graph, found.sites, half_precision=packed, loops=loops) for graph in (found.encoder, found.decoder)
    ]
    return Core(parts[0], parts[1], found.names, found.shapes, found.side, found.low_res)


@torch.no_grad()
def trace_marks(model: nn.Module, family: Family) -> Marked:
    """The first half of :func:`trace`, before any site is filled in.

    Raises:
        ConfigError: The family gives no halves.
    """
    side, low_res = family.image_size(model), family.low_res_size(model)
    halves = family.halves(model)
    pixels = torch.zeros(1, 3, side, side)
    with marked(model) as sites:
        between = halves.encoder(pixels)
        shapes = tuple(tuple(tensor.shape) for tensor in between)
        encoder = _traced(halves.encoder, (pixels,), ("pixel_values",), halves.names, {}, marks=bool(sites))
        points, labels = torch.zeros(1, POINTS, 2), torch.ones(1, POINTS)
        prompts = (points, labels, torch.zeros(1, 1, low_res, low_res), torch.zeros(1))
        names = ("points", "labels", "mask", "has_mask")
        free = {"points": {0: "prompts", 1: "count"}, "labels": {0: "prompts", 1: "count"}}
        free |= {"mask": {0: "masks"}, "has_mask": {0: "masks"}}
        free |= {"logits": {0: "prompts"}, "iou": {0: "prompts"}}
        # Some tensors per prompt: a dimension of 1 in the trace is a constant in what PyTorch writes.
        decoder = _traced(
            halves.decoder, (*between, *prompts), (*halves.names, *names), ("logits", "iou"), free, marks=bool(sites)
        )
    return Marked(encoder, decoder, sites, halves.names, shapes, side, low_res)


def _traced(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    names: Sequence[str],
    outputs: Sequence[str],
    free: Mapping[str, Mapping[int, str]],
    *,
    marks: bool,
) -> onnx.GraphProto:
    """PyTorch's tracing exporter: its own messages are about models written by hand."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            inputs,
            buffer,
            input_names=list(names),
            output_names=list(outputs),
            dynamic_axes={name: dict(axes) for name, axes in free.items()},
            opset_version=OPSET,
            do_constant_folding=False,
            custom_opsets={DOMAIN: 1} if marks else None,
            dynamo=False,
        )
    return onnx.load_from_string(buffer.getvalue()).graph


def _filled(graph: onnx.GraphProto, sites: Mapping[str, nn.Module], *, half_precision: bool, loops: bool) -> Half:
    """Puts the integer form of every site in the place of its mark."""
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    lowered: list[Lowered] = []
    for node in graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        name = site_of(node)
        stretch, facts = lower(node, sites[name], loops=loops)
        if _is_quantized(sites[name]):
            lowered.append(facts)
        nodes += stretch.nodes
        constants += stretch.constants
    constants = [*graph.initializer, *constants]
    last = [node.name for node in nodes if node.op_type == "Transpose" and node.name.endswith(f"/{LAST}")]
    nodes = sunk(nodes, constants, [output.name for output in graph.output], last)
    halved = []
    kept = []
    for tensor in constants:
        smaller = _halved(tensor) if half_precision else None
        if smaller is None:
            kept.append(tensor)
            continue
        kept.append(smaller)
        halved.append(
            helper.make_node("Cast", [smaller.name], [tensor.name], name=f"{tensor.name}/Cast", to=TensorProto.FLOAT)
        )
    result = helper.make_graph([*halved, *nodes], graph.name, graph.input, graph.output, kept)
    return Half(result, tuple(lowered))


def site_of(mark: onnx.NodeProto) -> str:
    """Module path of the site that a mark stands for."""
    return helper.get_node_attr_value(mark, "name").decode()


def lower(mark: onnx.NodeProto, site: nn.Module, *, loops: bool = True) -> tuple[Stretch, Lowered]:
    """What comes in the place of a mark."""
    stretch = Stretch(site_of(mark))
    if mark.op_type == ATTENTION:
        return stretch, lower_attention(stretch, site, call_of(mark), loops=loops)
    shapes = helper.get_node_attr_value(mark, "input"), helper.get_node_attr_value(mark, "output")
    return stretch, lower_layer(stretch, site, mark.input[0], mark.output[0], shapes)


def _is_quantized(site: nn.Module) -> bool:
    """Whether a site has any codes: with 16 bits throughout, as in an encoder that was left alone, it has none."""
    if isinstance(site, MatMulQuantizers):
        return any(each.bits < 16 for each in (site.query, site.key, site.value, site.probs))
    return site.weight_bits < 16 or site.input_quantizer.bits < 16


def call_of(mark: onnx.NodeProto) -> Call:
    """The call of an attention that a mark stands for."""
    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in mark.attribute}
    query, key, value, *more = mark.input
    sides = tuple(found["sides"])
    return Call(
        query,
        key,
        value,
        mark.output[0],
        found["scaling"],
        tuple(tuple(found[which]) for which in ("query", "key", "value")),
        mask=more[0] if len(more) == 1 else "",
        relative=tuple(more) if len(more) == 2 else (),
        sides=sides,
    )


def _halved(tensor: onnx.TensorProto) -> onnx.TensorProto | None:
    """A float32 constant as float16, if that loses nothing: packed folders hold in float16 what is not quantized."""
    if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < HALF_ELEMENTS:
        return None
    values = numpy_helper.to_array(tensor)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), values):
        return None
    return numpy_helper.from_array(half, f"{tensor.name}/half")
