"""The measures of METHOD.md, 10, as pure functions of attention rows and errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Share of a row's mass, spread over all keys, that is added before logarithms are taken (see smoothed).
FLOOR = 1e-4
# Relative errors below it are taken for it: the logarithm of an exact stage would swamp the total variation.
LEAST_ERROR = 1e-12


def smoothed(probs: Tensor) -> Tensor:
    """Rows as distributions without zeros: (p + FLOOR/n) / (Σp + FLOOR) for n keys.

    Quantized rows hold zeros, and per-tensor grids leave rows that do not sum to one. The floor is the same for float
    and quantized rows, so equal rows stay equal; it shifts an entropy by less than 0.002 nats. A dead row, all of whose
    values rounded to zero, becomes the uniform distribution: it says nothing about its keys.

    Args:
        probs: (..., keys), not negative.
    """
    lifted = probs + FLOOR / probs.shape[-1]
    return lifted / lifted.sum(-1, keepdim=True)


def entropy(probs: Tensor) -> Tensor:
    """Entropy in nats of each smoothed row, (..., keys) → (...): 0 for one key, log(keys) for all alike or none."""
    rows = smoothed(probs)
    return -(rows * rows.log()).sum(-1)


def kl_divergence(probs: Tensor, quantized: Tensor) -> Tensor:
    """KL(P‖P̂) in nats of smoothed rows, (..., keys) → (...): ≥ 0, and 0 exactly where rows are equal.

    The floor bounds it: a key with all of P's mass and none of P̂'s counts log(keys/FLOOR).
    """
    rows, approximation = smoothed(probs), smoothed(quantized)
    return (rows * (rows / approximation).log()).sum(-1).clamp(min=0)


def focus_overlap(probs: Tensor, quantized: Tensor) -> Tensor:
    """IoU of {P > ½ max P} and {P̂ > ½ max P̂} of each row, (..., keys) → (...), 0..1; 0 for a dead row."""
    focus, other = (rows > rows.amax(-1, keepdim=True) / 2 for rows in (probs, quantized))
    return (focus & other).sum(-1) / (focus | other).sum(-1).clamp(min=1)


def dead_rows(quantized: Tensor) -> Tensor:
    """Whether all of a row rounded to zero, (..., keys) → (...)."""
    return quantized.amax(-1) == 0


def total_variation(errors: Sequence[float]) -> float:
    """Σ |log e_{i+1} − log e_i| over stages in execution order: how much the error swings along the decoder."""
    logs = [math.log(max(error, LEAST_ERROR)) for error in errors]
    return sum(abs(after - before) for before, after in itertools.pairwise(logs))


class RelativeError:
    """Σ (x̂ − x)² / Σ (x − mean)², accumulated over tensors."""

    def __init__(self) -> None:
        self._error = self._sum = self._square = 0.0
        self._count = 0

    def update(self, value: Tensor, reference: Tensor) -> None:
        """Takes x̂ and x, of one shape."""
        self._error += (value - reference).square().sum(dtype=torch.float64).item()
        self._sum += reference.sum(dtype=torch.float64).item()
        self._square += reference.double().square().sum().item()
        self._count += reference.numel()

    @property
    def value(self) -> float:
        """The error; NaN before the first update."""
        if not self._count:
            return math.nan
        return self._error / max(self._square - self._sum**2 / self._count, 1e-30)
