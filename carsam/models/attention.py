"""Attention with quantized MatMuls: QKᵀ on Q̂ and K̂, PV on P̂ and V̂."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from carsam.models.implementations import IMPLEMENTATION
from carsam.quantizers.simulation import current, product

# Scores of one image in memory at a time: bounds the temporaries of an attention over a whole image (128 MB).
CHUNK_ELEMENTS = 2**25
# And at a time where nobody looks on (8 MB): larger temporaries come from the operating system page by page each time,
# which takes a global attention of ViT-B half of its time.
PIECE_ELEMENTS = 2**21


def pieces(heads: int, queries: int, keys: int, unit: int = 1) -> Iterator[tuple[slice, slice]]:
    """Slices of heads and of queries that are computed at a time, in order: rows of P hang on nothing but their query.

    Who observes is given whole heads, as many of each as ever: records keep a few rows of every piece.

    Args:
        heads: Of all of the batch.
        queries, keys: Of a head.
        unit: Queries that stay together: a row of a map.
    """
    whole = current().whole_heads or current().observe is not None
    most = CHUNK_ELEMENTS if whole else min(PIECE_ELEMENTS, CHUNK_ELEMENTS)
    together = max(1, most // (queries * keys))
    rows = queries if whole or together > 1 else max(1, most // (keys * unit)) * unit
    for head in range(0, heads, together):
        for row in range(0, queries, rows):
            yield slice(head, min(head + together, heads)), slice(row, min(row + rows, queries))


def _joined(parts: list[tuple[slice, Tensor]]) -> Tensor:
    """Outputs of :func:`pieces` with their heads, as one (heads, queries, dim)."""
    whole: dict[int, list[Tensor]] = {}
    for heads, output in parts:
        whole.setdefault(heads.start, []).append(output)
    joined = [each[0] if len(each) == 1 else torch.cat(each, dim=1) for each in whole.values()]
    return joined[0] if len(joined) == 1 else torch.cat(joined)


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
            kept, and is computed piece by piece.
        """
        # The scale goes to the small operand: on the scores it would be one more sweep over the largest tensor there
        # is.
        query, key = self.query(query) * scaling, self.key(key)
        size = query.shape[2] * key.shape[2]
        if mask is None and query.shape[1] * size > CHUNK_ELEMENTS:
            shape = query.shape[:2]
            query, key, value = query.flatten(0, 1), key.flatten(0, 1), self.value(value).flatten(0, 1)
            parts = []
            for heads, rows in pieces(len(query), query.shape[1], key.shape[1]):
                scores = product(torch.matmul, query[heads, rows], key[heads].transpose(-2, -1))
                parts.append((heads, product(torch.matmul, self.probs(scores, value=value[heads]), value[heads])))
            return _joined(parts).unflatten(0, shape), None
        scores = product(torch.matmul, query, key.transpose(-2, -1))
        if mask is not None:
            scores = scores + mask
        value = self.value(value)
        probs = self.probs(scores, value=value)
        return product(torch.matmul, probs, value), probs

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
        width = 1 if relative is None else relative[0].shape[2]
        parts = []
        for heads, cells in pieces(len(query), tokens, tokens, unit=width):
            scores = product(torch.matmul, query[heads, cells], key[heads].transpose(-2, -1))
            if relative is not None:
                height = tokens // width
                rows = slice(cells.start // width, cells.stop // width)
                # Two broadcast additions in place: the full (tokens × tokens) bias is never built.
                grid = scores.view(len(scores), -1, width, height, width)
                grid.add_(relative[0][heads, rows][..., :, None]).add_(relative[1][heads, rows][..., None, :])
            parts.append((heads, product(torch.matmul, self.probs(scores, value=value[heads]), value[heads])))
        return _joined(parts)


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
        that is too large to be kept, and is computed piece by piece.
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
