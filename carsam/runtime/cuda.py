"""A packed model on a GPU: integer products in Triton kernels, the rest of the image encoder in bfloat16.

The decoder, which takes a few milliseconds and decides where a mask ends, keeps float32 between its integer products.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from carsam.models.family import family_of
from carsam.pack.layers import PackedLayer
from carsam.quantizers import SiteQuantizer
from carsam.runtime.attention import QuantizedRelativeAttention
from carsam.runtime.convert import Converted, integer_linears
from carsam.runtime.linear import IntegerLinear

# Blocks of one kind share what is compiled for them; each kind, type and shape is an entry of its own.
COMPILED_VARIANTS = 64


def run_on_integers(
    model: PreTrainedModel, *, dtype: torch.dtype = torch.bfloat16, packed: bool = True, compiled: bool = True
) -> Converted:
    """Changes a quantized model, in place, to run on integers.

    Args:
        model: From :func:`carsam.load`, on any device; kernels run on CUDA, their references elsewhere.
        dtype: Of the image encoder between its integer products.
        packed: See :func:`carsam.runtime.convert.integer_linears`.
        compiled: Compile the encoder's blocks with torch.compile when they are first run (half a minute).

    Returns:
        What runs on integers, and what does not.

    Raises:
        ConfigError: No layer can.
    """
    done = integer_linears(model, packed=packed)
    encoder = family_of(model).embedding_module(model)
    if encoder is not model:
        lower(encoder, dtype)
        encoder.register_forward_pre_hook(_Cast(dtype), with_kwargs=True)
        encoder.register_forward_hook(_to_float32)
        if compiled:
            compile_blocks(encoder)
    return done


def lower(module: nn.Module, dtype: torch.dtype) -> None:
    """Changes the type of a module's floating-point tensors in place, except the grids, whose steps must stay exact."""
    for part in module.modules():
        if isinstance(part, (SiteQuantizer, IntegerLinear)):
            continue
        kept = {PackedLayer: {"weight_scale"}, QuantizedRelativeAttention: {"grids"}}.get(type(part), set())
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            if tensor.is_floating_point() and name not in kept:
                tensor.data = tensor.data.to(dtype)


def compile_blocks(encoder: nn.Module) -> None:
    """Has the blocks of an encoder compiled one by one, in place: like blocks share the result.

    Blocks are the members of its longest list of modules; the rest of the encoder is run as it is.
    """
    limit = torch._dynamo.config
    limit.recompile_limit = max(limit.recompile_limit, COMPILED_VARIANTS)
    lists = [part for part in encoder.modules() if isinstance(part, nn.ModuleList)]
    for block in max(lists, key=len, default=()):
        block.compile(dynamic=False)


class _Cast:
    """Casts what an encoder is called with."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tuple(map(self._cast, args)), {name: self._cast(value) for name, value in kwargs.items()}

    def _cast(self, value: object) -> object:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _to_float32(module: nn.Module, args: tuple, outputs: object) -> object:
    if isinstance(outputs, Tensor):
        return outputs.float()
    for name, value in outputs.items():
        if isinstance(value, Tensor):
            outputs[name] = value.float()
    return outputs
