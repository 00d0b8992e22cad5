"""The uniform grid of a softmax output, one for the whole tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from carsam.quantizers.simulation import current
from carsam.quantizers.softmax import SoftmaxQuantizer
from carsam.quantizers.uniform import ActivationQuantizer


class UniformSoftmax(SoftmaxQuantizer):
    """softmax, then a uniform per-tensor quantizer (the setting of the paper)."""

    grid = "uniform"

    def __init__(self, bits: int, *, always: bool = False):
        super().__init__()
        self.quantizer = ActivationQuantizer(bits, always=always)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.quantizer.bits

    def site_quantizer(self) -> ActivationQuantizer:
        return self.quantizer

    def forward(self, scores: Tensor, value: Tensor | None = None) -> Tensor:
        """Quantized attention from scores (..., queries, keys)."""
        return self.quantizer(torch.softmax(scores, dim=-1), drop=current().drop_probs)
