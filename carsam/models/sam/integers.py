"""The parts of SAM's image encoder that run on integers as a whole: its attentions and its MLPs."""

from __future__ import annotations

from torch import nn
from transformers.activations import GELUActivation
from transformers.models.sam.modeling_sam import SamMLPBlock

from carsam.models.sam.attention import QuantizedVisionAttention
from carsam.runtime.attention import QuantizedRelativeAttention, why_not
from carsam.runtime.linear import IntegerLinear
from carsam.runtime.mlp import IntegerMlp


def integer_module(module: nn.Module) -> nn.Module | None:
    """See :meth:`carsam.models.family.Family.integer_module`."""
    if isinstance(module, QuantizedVisionAttention):
        return _attention(module)
    if isinstance(module, SamMLPBlock) and isinstance(module.act, (GELUActivation, nn.GELU)):
        layers = module.lin1, module.lin2
        exact = getattr(module.act, "approximate", "none") == "none"
        # The first product's kernel ends with the bytes of a grid that is the same for all channels.
        whole = exact and all(isinstance(each, IntegerLinear) for each in layers) and layers[1].shift is None
        return IntegerMlp(*layers) if whole else None
    return None


def _attention(module: QuantizedVisionAttention) -> nn.Module | None:
    if not module.use_rel_pos or why_not(module.matmul):
        return None
    # A table has 2 n - 1 rows for windows (or an image) of n tokens a side.
    sides = [(len(table) + 1) // 2 for table in (module.rel_pos_h, module.rel_pos_w)]
    tables = [module.get_rel_pos(n, n, table) for n, table in zip(sides, (module.rel_pos_h, module.rel_pos_w))]
    heads = module.num_attention_heads
    return QuantizedRelativeAttention(module.qkv, module.proj, module.matmul, heads, module.scale, tuple(tables))
