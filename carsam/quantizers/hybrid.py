"""HLUQ, Hybrid Log-Uniform Quantization (AHCPTQ, ICCV 2025, arXiv 2503.03088), for the input of an MLP's second layer.

After GELU or ReLU most values are small and dense, few are large and sparse. Some of the codes take steps that double
(the log zone, above the foot of the range), the others equal steps (the uniform zone, above the split).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from carsam.quantizers.ranges import PERCENTILE
from carsam.quantizers.record import Record
from carsam.quantizers.sampling import step_for
from carsam.quantizers.site import SiteQuantizer

# What the public code chooses from: the log zone's share of the codes, and of the range.
CODE_SHARES, RANGE_SHARES = (1 / 8, 1 / 4, 1 / 2), (0.1, 0.3, 0.5)
# Shares of the largest value that are tried as top of the grid where the observer shrinks ranges.
TOPS = torch.logspace(-1, 0, 10)
# Rows of one forward pass that stand for it in the search.
RECORDED_ROWS = 16


def round_hybrid(height: Tensor, step: Tensor, split: Tensor, log_codes: int, bits: int) -> Tensor:
    """Rounds heights above the foot of the grid.

    The grid is 0, then split · 2^−q for q = L − 1 … 0 (rounded in the logarithm), then split + k · step for
    k = 1 … 2^bits − 1 − L, where L is ``log_codes``. The zones meet at the split.

    Args:
        height: x − foot, any shape; a new tensor is returned.
        step: Step of the uniform zone (scalar).
        split: Height of the split, > 0 (scalar).
        log_codes: L, codes of the log zone without the foot.
        bits: Bits of a code.
    """
    uniform = ((height - split) / step).round_().clamp_(0, 2**bits - 1 - log_codes).mul_(step)
    exponent = (height / split).clamp_(2.0 ** -(log_codes + 1), 1).log2_().neg_().round_()
    # 1 for q < L and 0 beyond, where the code means the foot itself; exponents are whole numbers.
    alive = (log_codes - exponent).clamp_(0, 1)
    return exponent.neg_().exp2_().mul_(alive).mul_(split).add_(uniform)


class HybridQuantizer(SiteQuantizer):
    """Log-uniform quantizer of one activation site: x̂ = foot + G(x − foot), G the grid of :func:`round_hybrid`.

    Codes: 0 is the foot, 1 … L the log zone upwards, the rest the uniform zone. Step and split are learned.

    Buffers: ``scale`` (2,) float32, step of the uniform zone and height of the split above the foot; ``offset``
    (float32 scalar), the foot in steps; ``log_codes`` (uint8 scalar), L.
    """

    grid = "log-uniform"
    note = "log-uniform"

    def __init__(self, bits: int, *, always: bool = False):
        super().__init__(bits, always=always)
        self._codes: tuple[int, int] = (-1, 0)
        if bits < 16:
            self.register_buffer("scale", torch.full((2,), float("nan")))
            self.register_buffer("offset", torch.tensor(0.0))
            self.register_buffer("log_codes", torch.tensor(1, dtype=torch.uint8))

    def record(self) -> HybridRecord:
        return HybridRecord()

    def fault(self) -> str:
        fault = super().fault()
        if fault or self.bits >= 16:
            return fault
        usable = bool(torch.isfinite(self.offset)) and 1 <= int(self.log_codes) < 2**self.bits - 1
        return "" if usable and self.scale.numel() == 2 else "no usable split"

    def set_grid(self, step: Tensor, split: Tensor, foot: Tensor, log_codes: int) -> None:
        """Sets the step of the uniform zone, the split's height above the foot, and the foot (scalars), and L."""
        scale = torch.stack([step, split]).float()
        codes = torch.tensor(log_codes, dtype=torch.uint8)
        self.load_grid({"scale": scale, "offset": (foot / step).float(), "log_codes": codes})

    def load_grid(self, buffers: dict[str, Tensor]) -> None:
        super().load_grid(buffers)
        self._codes = (-1, 0)

    def zones(self) -> tuple[int, int]:
        """Codes of the log zone without the foot, and of the uniform zone: read only after the buffer changed."""
        version = self.log_codes._version
        if self._codes[0] != version:
            self._codes = (version, int(self.log_codes))
        return self._codes[1], 2**self.bits - 1 - self._codes[1]

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        step, split = scale
        foot = step * self.offset
        return round_hybrid(x - foot, step, split, self.zones()[0], self.bits).add_(foot)

    def position(self, x: Tensor, scale: Tensor) -> tuple[Tensor, float | Tensor, float | Tensor]:
        # Below: half the first step of the log zone; above: half a step of the uniform zone.
        step, split, offset = (*scale, self.offset) if scale.is_cuda else (*scale.tolist(), float(self.offset))
        foot, (log_codes, uniform_codes) = step * offset, self.zones()
        return x, foot - split * 2.0**-log_codes, foot + split + step * (uniform_codes + 0.5)

    def scale_gradient(self, grad: Tensor, passed: Tensor, x: Tensor, out: Tensor, scale: Tensor) -> Tensor:
        # LSQ's in each zone: (x̂ − x)/s for the step or split that the zone belongs to; beyond the top
        # x̂ = offset · step + split + (number of codes) · step, below the foot x̂ = offset · step.
        step, split = scale
        above = (x - step * self.offset > split).to(x.dtype).reshape(-1)
        inside, clipped = (passed * (out - x)).reshape(-1), (grad - passed).reshape(-1)
        uniform, over = torch.dot(inside, above), torch.dot(clipped, above)
        of_step = uniform / step + over * self.zones()[1] + clipped.sum() * self.offset
        return torch.stack([of_step, (inside.sum() - uniform) / split + over])

    def encode(self, x: Tensor) -> Tensor:
        (step, split), (log_codes, uniform_codes) = self.scale, self.zones()
        height = x - step * self.offset
        exponent = (height / split).clamp_(2.0 ** -(log_codes + 1), 1).log2_().neg_().round_().clamp_(max=log_codes)
        uniform = ((height - split) / step).round_().clamp_(0, uniform_codes)
        return (log_codes - exponent + uniform).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        (step, split), (log_codes, _) = self.scale, self.zones()
        codes = codes.float()
        log = torch.exp2(codes.clamp(max=log_codes) - log_codes) * (codes > 0)
        return log * split + (codes - log_codes).clamp(min=0) * step + step * self.offset


class HybridRecord(Record):
    """Ends of every pass, some rows of the layer's input, and the weight that they are multiplied with."""

    def __init__(self) -> None:
        self.lows: list[float] = []
        self.highs: list[float] = []
        self.rows: list[Tensor] = []
        self.weight: Tensor | None = None

    @property
    def seen(self) -> bool:
        return bool(self.highs)

    def update(self, values: Tensor, weight: Tensor | None = None, **_: Any) -> None:
        """Takes the values (..., channels) of one forward pass, and the layer's weight (out, channels)."""
        values = values.detach()
        low, high = values.aminmax()
        self.lows.append(low.item())
        self.highs.append(high.item())
        rows = values.flatten(0, -2)
        step = step_for(len(rows), RECORDED_ROWS)
        self.rows.append(rows[len(self.rows) % step :: step][: 2 * RECORDED_ROWS].to("cpu", torch.float32).clone())
        self.weight = None if weight is None or weight.dim() != 2 else weight.detach()

    def fit(self, quantizer: HybridQuantizer, observer: str) -> None:
        """Chooses the zones by the least squared error of the layer's output (of the values, without a weight).

        The range is the observer's: ``moving-average`` is the public code's. ``mse`` shrinks ranges, and so the top of
        the grid is chosen as well.
        """
        lows, highs = torch.tensor(self.lows), torch.tensor(self.highs)
        rows = torch.cat(self.rows)
        low, high = lows.min(), highs.max()
        if observer == "moving-average":
            low, high = lows.mean(), highs.mean()
        elif observer == "percentile":
            ranked = rows.flatten().sort().values
            last = ranked.numel() - 1
            low, high = ranked[round((1 - PERCENTILE) * last)], ranked[round(PERCENTILE * last)]
        device = quantizer.scale.device
        tops = TOPS if observer == "mse" else TOPS[-1:]
        weight = None if self.weight is None else self.weight.to(device, torch.float32)
        quantizer.set_grid(*search_hybrid(rows.to(device), low, high, quantizer.bits, weight, tops=tops))


def search_hybrid(
    rows: Tensor, low: Tensor, high: Tensor, bits: int, weight: Tensor | None = None, *, tops: Tensor = TOPS
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The zones with the least squared error of rows times a weight.

    Args:
        rows: (n, channels) inputs of a layer.
        low, high: Ends of the range (scalars).
        bits: Bits of a code.
        weight: (out, channels) of the layer; None for the error of the rows themselves.
        tops: Shares of the largest value to try as top of the grid: with the best zones, which are then chosen again.

    Returns:
        ``(step, split, foot, log_codes)`` of :meth:`HybridQuantizer.set_grid`.
    """
    low, high = low.to(rows).clamp(max=0), high.to(rows).clamp(min=0)
    codes = 2**bits

    def grid(top_share: float, range_share: float, code_share: float) -> tuple[Tensor, Tensor, Tensor, int]:
        spread = (high * top_share - low).clamp(min=1e-8)
        step = spread * ((1 - range_share) / ((codes - 1) * (1 - code_share)))
        return step, spread * range_share, low, max(1, int(codes * code_share))

    def best(candidates: list[tuple[float, float, float]]) -> tuple[float, float, float]:
        errors = []
        for candidate in candidates:
            step, split, foot, log_codes = grid(*candidate)
            difference = round_hybrid(rows - foot, step, split, log_codes, bits).add_(foot).sub_(rows)
            errors.append((difference if weight is None else F.linear(difference, weight)).square().sum())
        return candidates[int(torch.stack(errors).argmin())]

    zones = [(share, codes_of) for share in RANGE_SHARES for codes_of in CODE_SHARES]
    chosen = best([(1.0, *zone) for zone in zones])
    if len(tops) > 1:
        top = best([(share, *chosen[1:]) for share in tops.tolist()])[0]
        chosen = best([(top, *zone) for zone in zones])
    return grid(*chosen)
