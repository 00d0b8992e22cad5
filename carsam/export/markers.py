"""Marks in a traced graph: where a quantized layer or attention stands, to be filled in afterwards.

While a model is traced, its quantized layers and the cores of its quantized attentions compute nothing: they give
zeros of the right shape and leave a node of the domain ``carsam`` with the site's name. So tracing takes no time, and
weights never pass through the tracer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from carsam.models.attention import MatMulQuantizers
from carsam.models.sites import replace_module
from carsam.pack.layers import PackedLayer
from carsam.quantizers import QuantizedLayer

DOMAIN, LAYER, ATTENTION = "carsam", "Layer", "Attention"


Shapes = tuple[tuple[int, ...], ...]


class _LayerMark(torch.autograd.Function):
    """Shapes are given beside the tensors: while a graph is translated, not every one is known."""

    @staticmethod
    def forward(ctx, x: Tensor, name: str, shapes: Shapes) -> Tensor:
        return x.new_zeros(shapes[1])

    @staticmethod
    def symbolic(g, x, name, shapes):
        mark = g.op(f"{DOMAIN}::{LAYER}", x, name_s=name, input_i=list(shapes[0]), output_i=list(shapes[1]))
        # Of this rank; sizes may be free.
        return mark.setType(x.type().with_sizes([None] * len(shapes[1])))


class _AttentionMark(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name: str, scaling: float, shapes: Shapes, *tensors: Tensor) -> Tensor:
        return tensors[0].new_zeros((*shapes[0][:-1], shapes[2][-1]))

    @staticmethod
    def symbolic(g, name, scaling, shapes, *tensors):
        known = {f"{which}_i": list(shape) for which, shape in zip(("query", "key", "value"), shapes)}
        sides = [shape[-1] for shape in shapes[3:]] if len(shapes) == 5 else [0, 0]
        mark = g.op(f"{DOMAIN}::{ATTENTION}", *tensors, name_s=name, scaling_f=float(scaling), sides_i=sides, **known)
        return mark.setType(tensors[0].type().with_sizes([None] * len(shapes[0])))


class MarkedLayer(nn.Module):
    """Stands in the place of a quantized layer while its model is traced."""

    def __init__(self, name: str, layer: nn.Module):
        super().__init__()
        self.name, self.conv = name, layer.conv
        self.shape = layer.shape if isinstance(layer, PackedLayer) else tuple(layer.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Zeros in the shape of the layer's output."""
        shape = _shape(x)
        return _LayerMark.apply(x, self.name, (shape, self._output(shape)))

    def _output(self, shape: Sequence[int]) -> tuple[int, ...]:
        if self.conv is None:
            return (*shape[:-1], self.shape[0])
        sides = []
        for axis in range(2):
            reach = self.conv["dilation"][axis] * (self.shape[2 + axis] - 1) + 1
            room = shape[2 + axis] + 2 * self.conv["padding"][axis] - reach
            sides.append(room // self.conv["stride"][axis] + 1)
        return (shape[0], self.shape[0], *sides)


class MarkedMatMul(MatMulQuantizers):
    """Stands in the place of an attention's quantizers while its model is traced."""

    def __init__(self, name: str):
        nn.Module.__init__(self)
        self.name = name

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        tensors = (query, key, value) if mask is None else (query, key, value, mask)
        return self._mark(scaling, tensors), None

    def attend_grid(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, relative: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        return self._mark(scaling, (query, key, value, *(relative or ())))

    def _mark(self, scaling: float, tensors: tuple[Tensor, ...]) -> Tensor:
        return _AttentionMark.apply(self.name, scaling, tuple(_shape(each) for each in tensors), *tensors)


def _shape(x: Tensor) -> tuple[int, ...]:
    # Plain numbers: the tracer's own would become part of the graph.
    return tuple(int(size) for size in x.shape)


@contextmanager
def marked(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """Puts marks in the places of all quantized layers and attentions inside the block.

    Yields:
        What stands there otherwise, by module path: a layer, or an attention's ``MatMulQuantizers``.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, (PackedLayer, QuantizedLayer)):
            found[name] = module
        elif isinstance(getattr(module, "matmul", None), MatMulQuantizers):
            found[name] = module.matmul
    places = {name: f"{name}.matmul" if isinstance(found[name], MatMulQuantizers) else name for name in found}
    try:
        for name, module in found.items():
            mark = MarkedMatMul(name) if isinstance(module, MatMulQuantizers) else MarkedLayer(name, module)
            replace_module(model, places[name], mark)
        yield found
    finally:
        for name, module in found.items():
            replace_module(model, places[name], module)
