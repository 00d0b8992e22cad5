"""The uniform grid of a softmax output, one for the whole tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from carsam.quantizers.affine import qmax
from carsam.quantizers.record import SiteRecord
from carsam.quantizers.simulation import current
from carsam.quantizers.softmax import SoftmaxQuantizer
from carsam.quantizers.softmax_log2 import ProbabilityRecord
from carsam.quantizers.uniform import ActivationQuantizer

# How the step of P is found: by the error of what P is multiplied with, or as the step of any other site.
RANGES = ("product", "observer")
# Shares of the largest probability that are tried as top of the grid; broad rows over 4,096 keys want low tops.
COARSE = torch.logspace(-3, 0, 25)
FINE = torch.logspace(-1 / 8, 1 / 8, 9)


class UniformSoftmax(SoftmaxQuantizer):
    """softmax, then a uniform per-tensor quantizer (the setting of the paper).

    The step that is best for P itself serves the few large probabilities and rounds broad rows to zero as a whole; what
    the attention hands on is P̂V, and its best step is several times smaller (METHOD.md, 6a). So with the observer
    ``mse`` the step is the one of least squared error of P̂V over the calibration set.

    Args:
        bits: Bits of a code.
        always: Quantize regardless of the simulation.
        range_by: ``product`` for the step by the error of P̂V, ``observer`` for the step by P alone, as public code has
            it. Only ``mse`` is an error to take over to P̂V: other observers set P's range as any other site's.
    """

    grid = "uniform"

    def __init__(self, bits: int, *, always: bool = False, range_by: str = "product"):
        super().__init__()
        assert range_by in RANGES, range_by
        self.quantizer = ProbabilityQuantizer(bits, always=always, range_by=range_by)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.quantizer.bits

    def site_quantizer(self) -> ActivationQuantizer:
        return self.quantizer

    def forward(self, scores: Tensor, value: Tensor | None = None) -> Tensor:
        """Quantized attention from scores (..., queries, keys); observers also see ``value`` (..., keys, dim)."""
        return self.quantizer(torch.softmax(scores, dim=-1), drop=current().drop_probs, value=value)


class ProbabilityQuantizer(ActivationQuantizer):
    """The uniform quantizer of probabilities: codes and buffers of any other site, a range of its own."""

    def __init__(self, bits: int, *, always: bool = False, range_by: str = "product"):
        super().__init__(bits, always=always)
        self.range_by = range_by

    def record(self) -> UniformProbabilityRecord:
        return UniformProbabilityRecord()


class UniformProbabilityRecord(SiteRecord):
    """The record of probabilities with a uniform grid: that of any site, and some rows of P with their V."""

    def __init__(self) -> None:
        super().__init__()
        self.products = ProbabilityRecord()

    def update(self, values: Tensor, value: Tensor | None = None, **context: Any) -> None:
        """Takes the probabilities (..., queries, keys) of one forward pass and the values (..., keys, dim)."""
        super().update(values, **context)
        self.products.update(values, value)

    def fit(self, quantizer: ProbabilityQuantizer, observer: str) -> None:
        """The step by the least squared error of P̂V where rows were kept and the observer is ``mse``; see the class."""
        if observer != "mse" or quantizer.range_by != "product" or not self.products.rows:
            quantizer.set_grid(*self.uniform_grid(quantizer.bits, observer))
            return
        device = quantizer.scale.device
        high = torch.tensor(max(self.highs), device=device).clamp(min=1e-8)
        rows = self.products.products(device)
        best = _best(COARSE, rows, high, quantizer.bits)
        best = _best((best * FINE).clamp(max=1.0).unique(), rows, high, quantizer.bits)
        quantizer.set_grid(best * high / qmax(quantizer.bits), torch.tensor(0))


def _best(shares: Tensor, rows: list[tuple[Tensor, Tensor]], high: Tensor, bits: int) -> Tensor:
    """The share of the largest probability at the top of the grid with the least squared error of P̂V.

    Args:
        shares: (n,) candidates.
        rows: P (groups, rows, keys) and V (groups, keys, dim).
        high: The largest probability.
        bits: Bits of a code.
    """
    levels = qmax(bits)
    errors = torch.zeros(len(shares), dtype=torch.float64, device=high.device)
    for probs, value in rows:
        for i, share in enumerate(shares):
            step = share * high / levels
            difference = (probs / step).round_().clamp_(max=levels).mul_(step).sub_(probs)
            errors[i] += (difference @ value).square().sum(dtype=torch.float64)
    return shares[errors.argmin().item()]
