"""Attention with quantized MatMuls: QKᵀ on Q̂ and K̂, PV on P̂ and V̂."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from carsam.models.implementations import IMPLEMENTATION

# Scores of one image in memory at a time: bounds the temporaries of an attention over a whole image (128 MB).
CHUNK_ELEMENTS = 2**25


class MatMulQuantizers(nn.Module):
    """The quantizers of one attention's MatMul inputs: query, key, value, and the softmax output (from scores)."""

    def __init__(self, query: nn.Module, key: nn.Module, value: nn.Module, probs: nn.Module):
        super().__init__()
        self.query, self.key, self.value, self.probs = query, key, value, probs


def carsam_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls after projections and head split.

    Args:
        module: The attention, with its :class:`MatMulQuantizers` as ``module.matmul``.
        query: (batch, heads, queries, head_dim).
        key, value: (batch, heads, keys, head_dim).
        attention_mask: Added to the scores, or None.
        scaling: Factor of the scores.

    Returns:
        Output (batch, queries, heads, head_dim), and the quantized attention (batch, heads, queries, keys); None where
        that is too large to be kept, and its heads are computed one after the other.
    """
    quantizers: MatMulQuantizers = module.matmul
    # The scale goes to the small operand: on the scores it would be one more sweep over the largest tensor there is.
    query, key = quantizers.query(query) * scaling, quantizers.key(key)
    size = query.shape[2] * key.shape[2]
    if attention_mask is None and query.shape[1] * size > CHUNK_ELEMENTS:
        step, value = max(1, CHUNK_ELEMENTS // size), quantizers.value(value).flatten(0, 1)
        outputs = []
        for q, k, v in zip(query.flatten(0, 1).split(step), key.flatten(0, 1).split(step), value.split(step)):
            outputs.append(torch.matmul(quantizers.probs(torch.matmul(q, k.transpose(-2, -1)), value=v), v))
        output = torch.cat(outputs).unflatten(0, query.shape[:2])
        return output.transpose(1, 2).contiguous(), None
    scores = torch.matmul(query, key.transpose(-2, -1))
    if attention_mask is not None:
        scores = scores + attention_mask
    value = quantizers.value(value)
    probs = quantizers.probs(scores, value=value)
    output = torch.matmul(probs, value)
    return output.transpose(1, 2).contiguous(), probs


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, carsam_attention)


def attach_matmul_quantizers(attention: nn.Module, matmul: MatMulQuantizers) -> None:
    """Routes one attention through :func:`carsam_attention`.

    The attention gets a configuration of its own: a later ``model.set_attn_implementation(...)`` by the user must not
    silently take the MatMuls out of quantization.
    """
    attention.matmul = matmul
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = IMPLEMENTATION
