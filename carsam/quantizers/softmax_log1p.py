"""Codes of a softmax output that are uniform in ln(1 + αx)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from carsam.quantizers.affine import qmax
from carsam.quantizers.simulation import current
from carsam.quantizers.site import SiteQuantizer
from carsam.quantizers.softmax import SoftmaxQuantizer
from carsam.quantizers.softmax_log2 import COARSE_ROWS, ProbabilityRecord, product_errors

# Shares of the largest probability that are tried as top of the grid with every α, and with the best one thereafter.
COARSE = torch.logspace(-1, 0, 10)
FINE = torch.logspace(-1 / 9, 1 / 9, 9)


class Log1pSoftmax(SiteQuantizer, SoftmaxQuantizer):
    """LNQ, the logarithmic grid of AHCQ-SAM (arXiv 2503.03088 v4): between uniform steps and log2 codes.

    x is clipped to [0, s]; q = round(L ln(1 + αx) / ln(1 + αs)) and x̂ = ((1 + αs)^(q/L) − 1) / α, with L = 2^bits − 1.
    With α → 0 the grid is uniform on [0, s]; with a large α codes are dense near zero. Zero is a code, and so is s.
    Neither α nor s is learned while a unit is reconstructed.

    Buffers (float32 scalars): ``scale``, which is s, and ``curve``, which is α · s.

    Args:
        bits: Bits of a code.
        always: Quantize regardless of the simulation.
        extra_code: 0, or 1 for L = 2^bits as in the public code: 2^bits + 1 values, one more than the bits hold. Only
            to compare with its numbers.
    """

    grid = "log1p"
    note = "log1p codes"
    arguments: ClassVar[Mapping[str, int]] = {"extra_code": 1}
    learns_scale = False
    ALPHAS = (0.001, 0.1, 1.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)

    def __init__(self, bits: int, *, always: bool = False, extra_code: int = 0):
        super().__init__(bits, always=always)
        self.extra_code = extra_code
        if bits < 16:
            self.register_buffer("curve", torch.tensor(1.0))

    @property
    def top(self) -> int:
        """L, the largest code."""
        return qmax(self.bits) + self.extra_code

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "extra_code": self.extra_code}

    def record(self) -> Log1pRecord:
        return Log1pRecord()

    def fault(self) -> str:
        fault = super().fault()
        if fault or self.bits >= 16:
            return fault
        return "" if 1e-12 <= float(self.curve) < float("inf") else "no usable curve"

    def set_grid(self, scale: Tensor, alpha: float) -> None:
        """Sets the largest value s (scalar) and α."""
        self.load_grid({"scale": scale.float(), "curve": (alpha * scale).float()})

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        return round_log1p(x, scale, self.curve, self.top)

    def position(self, x: Tensor, scale: Tensor) -> tuple[Tensor, float, float | Tensor]:
        # Half a code above the top, in the logarithm; nothing lies below zero.
        above = torch.expm1(torch.log1p(self.curve) * (1 + 0.5 / self.top)) / self.curve * scale
        return x, -1.0, above if above.is_cuda else above.item()

    def encode(self, x: Tensor) -> Tensor:
        return log1p_code(x, self.scale, self.curve, self.top).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.expm1(codes.float() / self.top * torch.log1p(self.curve)) / self.curve * self.scale

    def forward(self, scores: Tensor, value: Tensor | None = None) -> Tensor:
        """Quantized attention from scores (..., queries, keys); observers also see ``value`` (..., keys, dim)."""
        return super().forward(torch.softmax(scores, dim=-1), drop=current().drop_probs, value=value)


class Log1pRecord(ProbabilityRecord):
    """The record of a site with a log1p grid."""

    def fit(self, quantizer: Log1pSoftmax, observer: str) -> None:
        """Searches α and s for the least squared error of P̂V on the rows kept, whatever the observer.

        Without rows (a softmax that was called without values) s is the largest probability, α the middle one.
        """
        device = quantizer.scale.device
        high = torch.tensor(max(self.highs), device=device).clamp(min=1e-8)
        alphas = quantizer.ALPHAS
        if not self.rows:
            quantizer.set_grid(high, alphas[len(alphas) // 2])
            return

        def best(candidates: list[tuple[float, float]], every: int) -> tuple[float, float]:
            rounders = [
                lambda probs, s=share * high, alpha=alpha: round_log1p(probs, s, alpha * s, quantizer.top)
                for alpha, share in candidates
            ]
            errors = product_errors(self.products(device, every), rounders)
            return candidates[min(range(len(errors)), key=errors.__getitem__)]

        every = COARSE_ROWS if len(self.rows) >= 8 * COARSE_ROWS else 1
        alpha, share = best([(alpha, share) for alpha in alphas for share in COARSE.tolist()], every)
        shares = (share * FINE).clamp(float(COARSE[0]), 1.0).unique().tolist()
        alpha, share = best([(alpha, each) for each in shares], 1)
        quantizer.set_grid(share * high, alpha)


def log1p_code(x: Tensor, scale: Tensor, curve: Tensor, top: int) -> Tensor:
    """q = round(L ln(1 + κ u) / ln(1 + κ)) for u = x/s clipped to [0, 1] and κ = α s; a new float tensor.

    Args:
        x: Values of any shape.
        scale: s (scalar).
        curve: κ (scalar).
        top: L.
    """
    return (x / scale).clamp_(0, 1).mul_(curve).log1p_().mul_(top / torch.log1p(curve)).round_()


def round_log1p(x: Tensor, scale: Tensor, curve: Tensor, top: int) -> Tensor:
    """((1 + κ)^(q/L) − 1) · s/κ for the q of :func:`log1p_code`; a new tensor."""
    return log1p_code(x, scale, curve, top).mul_(torch.log1p(curve) / top).expm1_().mul_(scale / curve)
