"""Quantizers of the softmax output P, from the scores: the second MatMul of an attention reads what these return."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carsam.quantizers.simulation import current, keep_mask
from carsam.quantizers.uniform import ActivationQuantizer, FakeQuantize, qmax


class UniformSoftmax(nn.Module):
    """softmax, then a uniform per-tensor quantizer (the setting of the paper)."""

    grid = "uniform"

    def __init__(self, bits: int, *, always: bool = False):
        super().__init__()
        self.quantizer = ActivationQuantizer(bits, always=always)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.quantizer.bits

    def forward(self, scores: Tensor) -> Tensor:
        """Quantized attention from scores (..., queries, keys)."""
        return self.quantizer(torch.softmax(scores, dim=-1), drop=current().drop_probs)


class RowMaximumSoftmax(nn.Module):
    """Codes relative to each row's maximum (METHOD.md, 9): codes = round(qmax · exp(S − max S)), divided by their sum.

    The step is 1/qmax for every row, so a head that attends broadly keeps its codes where a per-tensor grid rounds them
    to zero. Nothing is calibrated, and the row's sum is exact, so the quantized rows sum to one.
    """

    grid = "row-max"

    def __init__(self, bits: int, *, always: bool = False):
        super().__init__()
        self.bits = bits
        self.always = always

    def forward(self, scores: Tensor) -> Tensor:
        """Quantized attention from scores (..., queries, keys)."""
        state = current()
        if self.bits >= 16 or not (self.always or state.activations):
            return torch.softmax(scores, dim=-1)
        weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True).detach())
        dropped = state.drop > 0 and state.drop_probs and not self.always
        mask = keep_mask(weights.shape, state.drop, weights.device) if dropped else None
        codes = FakeQuantize.apply(weights, weights.new_tensor(1 / qmax(self.bits)), 0.0, float(qmax(self.bits)), mask)
        return codes / codes.sum(dim=-1, keepdim=True)


SOFTMAX_GRIDS = {kind.grid: kind for kind in (UniformSoftmax, RowMaximumSoftmax)}
