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

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention through the quantizers.

        Args:
            query: (batch, heads, queries, dim).
            key, value: (batch, heads, keys, dim).
            scaling: Factor of the scores.
            mask: Added to the scores, or None.

        Returns:
            Output (batch, heads, queries, dim) and P̂ (batch, heads, queries, keys); None where that is too large to be
            kept, and its heads are computed one after the other.
        """
        # The scale goes to the small operand: on the scores it would be one more sweep over the largest tensor there
        # is.
        query, key = self.query(query) * scaling, self.key(key)
        size = query.shape[2] * key.shape[2]
        if mask is None and query.shape[1] * size > CHUNK_ELEMENTS:
            step, value = max(1, CHUNK_ELEMENTS // size), self.value(value).flatten(0, 1)
            outputs = []
            for q, k, v in zip(query.flatten(0, 1).split(step), key.flatten(0, 1).split(step), value.split(step)):
                outputs.append(torch.matmul(self.probs(torch.matmul(q, k.transpose(-2, -1)), value=v), v))
            return torch.cat(outputs).unflatten(0, query.shape[:2]), None
        scores = torch.matmul(query, key.transpose(-2, -1))
        if mask is not None:
            scores = scores + mask
        value = self.value(value)
        probs = self.probs(scores, value=value)
        return torch.matmul(probs, value), probs

    def attend_grid(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, relative: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Attention of the cells of a map among each other, some heads at a time: (heads, cells, dim) → the same.

        Args:
            query, key, value: (heads, height · width, dim).
            scaling: Factor of the scores.
            relative: What is added to the scores for the row and for the column of the key, (heads, height, width,
                height) and (heads, height, width, width); None without relative positions.
        """
        tokens = query.shape[1]
        query, key, value = self.query(query) * scaling, self.key(key), self.value(value)
        step = max(1, CHUNK_ELEMENTS // tokens**2)
        outputs = []
        for start in range(0, len(query), step):
            part = slice(start, start + step)
            scores = torch.matmul(query[part], key[part].transpose(-2, -1))
            if relative is not None:
                height, width = relative[0].shape[1:3]
                # Two broadcast additions in place: the full (tokens × tokens) bias is never built.
                grid = scores.view(-1, height, width, height, width)
                grid.add_(relative[0][part][..., :, None]).add_(relative[1][part][..., None, :])
            outputs.append(torch.matmul(self.probs(scores, value=value[part]), value[part]))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


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
    output, probs = quantizers.attend(query, key, value, scaling, attention_mask)
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
