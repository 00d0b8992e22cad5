"""Logarithmic codes of a softmax output, and what the grids of P keep to be judged by P̂V."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from carsam.quantizers.affine import qmax
from carsam.quantizers.record import Record
from carsam.quantizers.sampling import step_for
from carsam.quantizers.simulation import current
from carsam.quantizers.site import SiteQuantizer
from carsam.quantizers.softmax import SoftmaxQuantizer

# Heads of one forward pass, and queries of each, whose P is kept with V to judge a grid by P̂V.
RECORDED_HEADS, RECORDED_ROWS = 2, 64
# Values of P kept from one forward pass: rows over thousands of keys are few, and every pass brings others.
RECORDED_VALUES = 2**18
# Shares of the largest probability that are tried as top of the grid with every τ, and around the best one thereafter.
COARSE = torch.logspace(-1.5, 0, 10)
FINE = torch.logspace(-1.5 / 9, 1.5 / 9, 9)
# Of the kept rows, every fourth judges the coarse search.
COARSE_ROWS = 4


class Log2Softmax(SiteQuantizer, SoftmaxQuantizer):
    """AGQ, Adaptive Granularity Quantization (PTQ4SAM, CVPR 2024, arXiv 2405.03144).

    P̂ = scale · 2^(−q/τ), q = round(−τ log2(P/scale)) from 0 to n − 1 where n = qmax, and zero beyond: with τ = 1 codes
    reach far down, with τ = 4 they are dense near the top. The last code is zero.

    Buffers: ``scale`` (float32 scalar), the largest value; ``tau`` (uint8 scalar).

    Args:
        bits: Bits of a code.
        always: Quantize regardless of the simulation.
        extra_code: 0, or 1 for n = 2^bits as in the public code: 2^bits + 1 values, one more than the bits hold. Only
            to compare with its numbers.
    """

    grid = "log2"
    note = "log2 codes"
    arguments: ClassVar[Mapping[str, int]] = {"extra_code": 1}
    TAUS = (1, 2, 4)

    def __init__(self, bits: int, *, always: bool = False, extra_code: int = 0):
        super().__init__(bits, always=always)
        self.extra_code = extra_code
        self._granularity: tuple[int, int] = (-1, 0)
        if bits < 16:
            self.register_buffer("tau", torch.tensor(1, dtype=torch.uint8))

    @property
    def zero(self) -> int:
        """The code of zero, and the number of codes that are not."""
        return qmax(self.bits) + self.extra_code

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "extra_code": self.extra_code}

    def record(self) -> Log2Record:
        return Log2Record()

    def fault(self) -> str:
        fault = super().fault()
        if fault or self.bits >= 16:
            return fault
        return "" if int(self.tau) in self.TAUS else "no usable granularity"

    def load_grid(self, buffers: dict[str, Tensor]) -> None:
        super().load_grid(buffers)
        self._granularity = (-1, 0)

    def granularity(self) -> int:
        """τ: read from the buffer only after it changed."""
        version = self.tau._version
        if self._granularity[0] != version:
            self._granularity = (version, int(self.tau))
        return self._granularity[1]

    def set_grid(self, scale: Tensor, tau: int) -> None:
        """Sets the largest value (scalar) and the granularity."""
        assert tau in self.TAUS
        self.load_grid({"scale": scale.float(), "tau": torch.tensor(tau, dtype=torch.uint8)})

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        return round_log2(x, scale, self.granularity(), self.zero)

    def position(self, x: Tensor, scale: Tensor) -> tuple[Tensor, float, float | Tensor]:
        # Half a code above the top, in the logarithm; nothing lies below zero, which is a code.
        return x, -1.0, (scale if scale.is_cuda else scale.item()) * 2.0 ** (0.5 / self.granularity())

    def encode(self, x: Tensor) -> Tensor:
        return log2_code(x, self.scale, int(self.tau), self.zero).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.exp2(codes.float() / -int(self.tau)) * self.scale * (codes < self.zero)

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
        heads, queries, keys = probs.shape
        step = step_for(queries, max(4, min(RECORDED_ROWS, RECORDED_VALUES // (RECORDED_HEADS * keys))))
        # A few heads and rows of every pass: rows differ far more between images and heads than within one.
        for head in range(len(self.rows) % heads, heads, step_for(heads, RECORDED_HEADS)):
            rows = probs[head, len(self.rows) % step :: step]
            self.rows.append((rows.half().cpu(), value[head].half().cpu()))

    def fit(self, quantizer: SiteQuantizer, observer: str) -> None:
        raise NotImplementedError

    def products(self, device: torch.device, every: int = 1) -> list[tuple[Tensor, Tensor]]:
        """The kept rows (n, rows, keys) with their V (n, keys, dim) on a device, float32, those of one shape together.

        Args:
            device: Where they are wanted.
            every: Leaves out all but every so manieth of what was kept.
        """
        by_shape: dict[tuple[torch.Size, torch.Size], list[tuple[Tensor, Tensor]]] = {}
        for rows, value in self.rows[::every]:
            by_shape.setdefault((rows.shape, value.shape), []).append((rows, value))
        return [tuple(torch.stack(part).to(device).float() for part in zip(*group)) for group in by_shape.values()]


def product_errors(products: list[tuple[Tensor, Tensor]], rounders: list[Callable[[Tensor], Tensor]]) -> list[float]:
    """Σ (P̂V − PV)² over kept rows, for every way to round P.

    Args:
        products: As :meth:`ProbabilityRecord.products` gives them.
        rounders: Each called with P, any shape; gives a new tensor P̂.
    """
    device = products[0][0].device
    errors = torch.zeros(len(rounders), dtype=torch.float64, device=device)
    for probs, value in products:
        for i, rounded in enumerate(rounders):
            errors[i] += (rounded(probs).sub_(probs) @ value).square().sum()
    return errors.tolist()


class Log2Record(ProbabilityRecord):
    """The record of a site with logarithmic codes."""

    def fit(self, quantizer: Log2Softmax, observer: str) -> None:
        """Searches τ and scale for the least squared error of P̂V on the rows kept, whatever the observer.

        Without rows (a softmax that was called without values) the scale is the largest probability, τ the middle one.
        """
        device = quantizer.scale.device
        high = torch.tensor(max(self.highs), device=device).clamp(min=1e-8)
        if not self.rows:
            quantizer.set_grid(high, quantizer.TAUS[len(quantizer.TAUS) // 2])
            return

        def best(candidates: list[tuple[int, float]], every: int) -> tuple[int, float]:
            rounders = [
                lambda probs, tau=tau, share=share: round_log2(probs, share * high, tau, quantizer.zero)
                for tau, share in candidates
            ]
            errors = product_errors(self.products(device, every), rounders)
            return candidates[min(range(len(errors)), key=errors.__getitem__)]

        # Of kept rows the first pass alone would judge where there are few.
        every = COARSE_ROWS if len(self.rows) >= 8 * COARSE_ROWS else 1
        tau, share = best([(tau, share) for tau in quantizer.TAUS for share in COARSE.tolist()], every)
        shares = (share * FINE).clamp(float(COARSE[0]), 1.0).unique().tolist()
        tau, share = best([(tau, each) for each in shares], 1)
        quantizer.set_grid(share * high, tau)


def log2_code(x: Tensor, scale: Tensor, tau: int, zero: int) -> Tensor:
    """q = clip(round(−τ log2(x/scale)), 0, zero), as a new float tensor; ``zero`` is the code of zero."""
    # The floor only keeps the logarithm finite: far below the last code.
    return (x / scale).clamp_(min=1e-30).log2_().mul_(-tau).round_().clamp_(0, zero)


def round_log2(x: Tensor, scale: Tensor, tau: int, zero: int) -> Tensor:
    """scale · 2^(−q/τ) for the q of :func:`log2_code`, and 0 for its last; a new tensor."""
    values = log2_code(x, scale, tau, zero).div_(-tau).exp2_()
    return F.threshold_(values, 2.0 ** ((0.5 - zero) / tau), 0.0).mul_(scale)
