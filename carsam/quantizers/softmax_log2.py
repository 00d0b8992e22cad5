"""Logarithmic codes of a softmax output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from carsam.quantizers.affine import qmax
from carsam.quantizers.record import Record
from carsam.quantizers.sampling import step_for
from carsam.quantizers.simulation import current
from carsam.quantizers.site import SiteQuantizer
from carsam.quantizers.softmax import SoftmaxQuantizer

# Heads of one forward pass, and queries of each, whose P is kept with V to choose a granularity by P̂V.
RECORDED_HEADS, RECORDED_ROWS = 2, 64


class Log2Softmax(SiteQuantizer, SoftmaxQuantizer):
    """AGQ, Adaptive Granularity Quantization (PTQ4SAM, CVPR 2024, arXiv 2405.03144).

    P̂ = scale · 2^(−q/τ), q = clip(round(−τ log2(P/scale)), 0, qmax): with τ = 1 codes reach far down, with τ = 4 they
    are dense near the top. No code is zero; the least value is scale · 2^(−qmax/τ).

    Buffers: ``scale`` (float32 scalar), the largest probability; ``tau`` (uint8 scalar).
    """

    grid = "log2"
    note = "log2 codes"
    TAUS = (1, 2, 4)

    def __init__(self, bits: int, *, always: bool = False):
        super().__init__(bits, always=always)
        if bits < 16:
            self.register_buffer("tau", torch.tensor(1, dtype=torch.uint8))

    def record(self) -> ProbabilityRecord:
        return ProbabilityRecord()

    def fault(self) -> str:
        fault = super().fault()
        if fault or self.bits >= 16:
            return fault
        return "" if int(self.tau) in self.TAUS else "no usable granularity"

    def set_grid(self, scale: Tensor, tau: int) -> None:
        """Sets the largest value (scalar) and the granularity."""
        assert tau in self.TAUS
        self.load_grid({"scale": scale.float(), "tau": torch.tensor(tau, dtype=torch.uint8)})

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        return round_log2(x, scale, int(self.tau), self.bits)

    def position(self, x: Tensor, scale: Tensor) -> tuple[Tensor, float, float]:
        # Half a code beyond either end, in the logarithm.
        tau, top = int(self.tau), scale.item()
        return x, top * 2.0 ** (-(qmax(self.bits) + 0.5) / tau), top * 2.0 ** (0.5 / tau)

    def encode(self, x: Tensor) -> Tensor:
        return log2_exponent(x, self.scale, int(self.tau), self.bits).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.exp2(codes.float() / -int(self.tau)) * self.scale

    def forward(self, scores: Tensor, value: Tensor | None = None) -> Tensor:
        """Quantized attention from scores (..., queries, keys); observers also see ``value`` (..., keys, dim)."""
        return super().forward(torch.softmax(scores, dim=-1), drop=current().drop_probs, value=value)


class ProbabilityRecord(Record):
    """The largest probability, and some rows of P with their V."""

    def __init__(self) -> None:
        self.highs: list[float] = []
        self.rows: list[tuple[Tensor, Tensor]] = []

    @property
    def seen(self) -> bool:
        return bool(self.highs)

    def update(self, values: Tensor, value: Tensor | None = None, **_: Any) -> None:
        """Takes the probabilities (..., queries, keys) of one forward pass and the values (..., keys, dim)."""
        self.highs.append(values.max().item())
        if value is None:
            return
        probs, value = values.detach().flatten(0, -3), value.detach().flatten(0, -3)
        # A few heads and rows of every pass: rows differ far more between images and heads than within one.
        for head in range(len(self.rows) % len(probs), len(probs), step_for(len(probs), RECORDED_HEADS)):
            rows = probs[head, :: step_for(probs.shape[1], RECORDED_ROWS)]
            self.rows.append((rows.half().cpu(), value[head].half().cpu()))

    def fit(self, quantizer: Log2Softmax, observer: str) -> None:
        """The granularity with the least error of P̂V (PTQ4SAM, section 4.3); the scale is the largest probability."""
        scale = torch.tensor(max(self.highs))
        errors = dict.fromkeys(quantizer.TAUS, 0.0)
        for rows, value in self.rows:
            rows, value = rows.float(), value.float()
            for tau in errors:
                difference = round_log2(rows, scale, tau, quantizer.bits).sub_(rows)
                errors[tau] += (difference @ value).square().sum().item()
        quantizer.set_grid(scale, min(errors, key=errors.get))


def log2_exponent(x: Tensor, scale: Tensor, tau: int, bits: int) -> Tensor:
    """q = clip(round(−τ log2(x/scale)), 0, qmax), as a new float tensor."""
    # The floor only keeps the logarithm finite: far below the last code.
    return (x / scale).clamp_(min=1e-30).log2_().mul_(-tau).round_().clamp_(0, qmax(bits))


def round_log2(x: Tensor, scale: Tensor, tau: int, bits: int) -> Tensor:
    """scale · 2^(−q/τ) for the q of :func:`log2_exponent`; a new tensor."""
    return log2_exponent(x, scale, tau, bits).div_(-tau).exp2_().mul_(scale)
