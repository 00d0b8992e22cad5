"""Row-maximum codes of a softmax output."""

from __future__ import annotations

import torch
from torch import Tensor

from carsam.quantizers.affine import qmax
from carsam.quantizers.simulation import current, keep_mask
from carsam.quantizers.softmax import SoftmaxQuantizer


class RowMaximumSoftmax(SoftmaxQuantizer):
    """Codes relative to each row's maximum (METHOD.md, 9): codes = round(qmax · exp(S − max S)), divided by their sum.

    The step is 1/qmax for every row, so a head that attends broadly keeps its codes where a per-tensor grid rounds them
    to zero. Nothing is calibrated, and the row's sum is exact, so the quantized rows sum to one.
    """

    grid = "row-max"
    note = "row-maximum codes"

    def __init__(self, bits: int, *, always: bool = False):
        super().__init__()
        self.bits = bits
        self.always = always

    def forward(self, scores: Tensor, value: Tensor | None = None) -> Tensor:
        """Quantized attention from scores (..., queries, keys)."""
        state = current()
        if self.bits >= 16 or not (self.always or state.activations):
            return torch.softmax(scores, dim=-1)
        weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True).detach())
        dropped = state.drop > 0 and state.drop_probs and not self.always
        mask = keep_mask(weights.shape, state.drop, weights.device) if dropped else None
        codes = _RoundToUnit.apply(weights, qmax(self.bits), mask)
        return codes / codes.sum(dim=-1, keepdim=True)


class _RoundToUnit(torch.autograd.Function):
    """round(x · levels) / levels for x in [0, 1], straight-through."""

    @staticmethod
    def forward(ctx, x: Tensor, levels: int, mask: Tensor | None) -> Tensor:
        out = (x * levels).round_().div_(levels)
        return out if mask is None else torch.lerp(x, out, mask.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None, None
