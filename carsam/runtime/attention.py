"""Attention with relative positions on quantized operands: an operation that torch.compile keeps as it is.

On CUDA it is a Triton kernel that never writes the map of scores; elsewhere its reference in torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from carsam.models.attention import MatMulQuantizers
from carsam.quantizers import UniformSoftmax
from carsam.runtime.integers import InputGrid, is_uniform

# Up to so many tokens the kernel quantizes what it loads; beyond, every key would be quantized too many times over.
RAW_TOKENS = 1024


@torch.library.custom_op("carsam::quantized_attention", mutates_args=())
def quantized_attention(
    qkv: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    grids: Tensor,
    height: int,
    width: int,
    raw: bool,
    dtype: torch.dtype,
) -> Tensor:
    """P̂V̂ of all heads.

    Args:
        qkv: (batch, tokens, 3, heads, channels): values if ``raw``, else the steps that they are quantized to.
        rel_h: (batch, heads, tokens, height) added to the scores of a row of keys.
        rel_w: (batch, heads, tokens, width), of a column.
        grids: From :func:`attention_grids`.
        height, width: Of the image or window, in tokens.
        raw: See ``qkv``.
        dtype: Of the result.

    Returns:
        (batch, tokens, heads, channels).
    """
    query, key, value = (steps_of(qkv, grids) if raw else qkv).float().permute(2, 0, 3, 1, 4)
    scores = (query @ key.transpose(-2, -1)) * (grids[12] / math.log2(math.e))
    scores = scores.unflatten(-1, (height, width)) + rel_h.float()[..., :, None] + rel_w.float()[..., None, :]
    probs = torch.softmax(scores.flatten(-2), dim=-1)
    probs = torch.clamp((probs / grids[9]).round(), grids[10], grids[11])
    return ((probs @ value) * (grids[9] * grids[6])).transpose(1, 2).to(dtype).contiguous()


@quantized_attention.register_fake
def _(qkv, rel_h, rel_w, grids, height, width, raw, dtype):
    batch, tokens, _, heads, channels = qkv.shape
    return qkv.new_empty((batch, tokens, heads, channels), dtype=dtype)


@quantized_attention.register_kernel("cuda")
def _(qkv, rel_h, rel_w, grids, height, width, raw, dtype):
    from carsam.runtime.kernels.attention import launch

    batch, tokens, _, heads, channels = qkv.shape
    out = torch.empty((batch, tokens, heads, channels), dtype=dtype, device=qkv.device)
    launch(qkv.contiguous(), rel_h.contiguous(), rel_w.contiguous(), grids, out, height, width, raw=raw)
    return out


def attention_grids(matmul: MatMulQuantizers, scaling: float) -> Tensor:
    """(13,) float32: scale, low and high of Q, K, V and P, and the factor of QKᵀ's whole numbers, in units of log2."""
    operands = [matmul.query, matmul.key, matmul.value, matmul.probs.site_quantizer()]
    values = torch.stack([InputGrid.of(operand).values[:3] for operand in operands])
    factor = values[0, 0] * values[1, 0] * scaling * math.log2(math.e)
    return torch.cat([values.flatten(), factor[None]])


def steps_of(qkv: Tensor, grids: Tensor) -> Tensor:
    """Whole numbers of steps of Q, K and V, in the type of ``qkv``: exact in bfloat16, which holds all up to 256."""
    scale, low, high = grids[:9].view(3, 3, 1, 1).unbind(1)
    return torch.clamp((qkv.float() / scale).round(), low, high).to(qkv.dtype)


def why_not(matmul: MatMulQuantizers) -> str:
    """Why an attention cannot run in this form; empty where it can."""
    if type(matmul.probs) is not UniformSoftmax:
        return f"its softmax output is on the grid {matmul.probs.grid}"
    operands = [matmul.query, matmul.key, matmul.value, matmul.probs.quantizer]
    if not all(is_uniform(operand) for operand in operands):
        return "an operand is not on one uniform grid"
    return "an operand is in floating point" if any(operand.bits > 8 for operand in operands) else ""


class QuantizedRelativeAttention(nn.Module):
    """An image encoder's attention: one Linear for queries, keys and values, relative positions of the float query.

    Args:
        projection, output: Linears before and after the MatMuls.
        matmul: The grids.
        heads: Number of heads.
        scaling: Factor of the scores.
        positions: (height, height, channels) and (width, width, channels): tables of query row by key row, and of
            columns.
    """

    def __init__(
        self,
        projection: nn.Module,
        output: nn.Module,
        matmul: MatMulQuantizers,
        heads: int,
        scaling: float,
        positions: tuple[Tensor, Tensor],
    ):
        super().__init__()
        self.projection, self.output, self.heads = projection, output, heads
        self.register_buffer("grids", attention_grids(matmul, scaling))
        self.register_buffer("positions_h", positions[0].detach().clone())
        self.register_buffer("positions_w", positions[1].detach().clone())

    def _apply(self, fn, recurse=True):
        """The grids stay float32 whatever the model's type becomes."""
        grids = self.grids
        super()._apply(fn, recurse)
        self.grids = grids.to(self.positions_h.device)
        return self

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = None) -> tuple[Tensor, None]:
        """(batch, height, width, channels) → the same; attention maps are not kept."""
        batch, height, width, _ = hidden_states.shape
        qkv = self.projection(hidden_states).view(batch, height * width, 3, self.heads, -1)
        grid = qkv[:, :, 0].unflatten(1, (height, width))
        rel_h = torch.einsum("bhwnc,hkc->bnhwk", grid, self.positions_h).flatten(2, 3)
        rel_w = torch.einsum("bhwnc,wkc->bnhwk", grid, self.positions_w).flatten(2, 3)
        raw = height * width <= RAW_TOKENS
        values = qkv if raw else steps_of(qkv, self.grids)
        attend = torch.ops.carsam.quantized_attention
        out = attend(values, rel_h, rel_w, self.grids, height, width, raw, qkv.dtype)
        return self.output(out.view(batch, height, width, -1)), None
