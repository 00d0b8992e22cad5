"""HLUQ, Hybrid Log-Uniform Quantization (AHCPTQ, ICCV 2025, arXiv 2503.03088), for the input of an MLP's second layer.

After GELU or ReLU most values are small and dense, few are large and sparse. Half of the codes take steps that double
(the log zone, next to the foot of the range), the other half equal steps (the uniform zone, above the split).
"""

from __future__ import annotations

import torch
from torch import Tensor

from carsam.quantizers.record import SiteRecord
from carsam.quantizers.sampling import even_ranks
from carsam.quantizers.site import SiteQuantizer

# Values that stand for a site in the search of its grid.
SEARCH_VALUES = 2048


def zone_size(bits: int) -> int:
    """Codes of each zone: one bit says which."""
    return 2 ** (bits - 1)


def round_hybrid(height: Tensor, width: Tensor | float, count: int) -> Tensor:
    """Rounds heights above the foot of the grid, in steps of the uniform zone.

    The grid is 0, then width · 2^−q for q = count − 2 … 0 (rounded in the logarithm), then width + k for k = 1 … count.
    The zones meet at ``width``, which is the top of one and the step before the first of the other.

    Args:
        height: x / scale − offset, any shape; a new tensor is returned.
        width: Height of the split, > 0; broadcasts.
        count: Codes of each zone.
    """
    uniform = (height - width).round_().clamp_(0, count)
    fraction = (height / width).clamp_(2.0 ** -(count + 1), 1)
    exponent = fraction.log2_().neg_().round_()
    # 1 for q < count − 1 and 0 beyond, where the code means the foot itself; exponents are whole numbers.
    alive = (count - 1 - exponent).clamp_(0, 1)
    return exponent.neg_().exp2_().mul_(alive).mul_(width).add_(uniform)


class HybridQuantizer(SiteQuantizer):
    """Log-uniform quantizer of one activation site: x̂ = scale · (offset + G(x / scale − offset)).

    G is the grid of :func:`round_hybrid`. Codes: 0 is the foot, 1 … 2^(b−1) − 1 the log zone upwards, the rest the
    uniform zone.

    Buffers (float32 scalars): ``scale``, the step of the uniform zone; ``split``, where the zones meet, and ``offset``,
    the foot, both in steps.
    """

    grid = "log-uniform"
    note = "log-uniform"

    def __init__(self, bits: int, *, always: bool = False):
        super().__init__(bits, always=always)
        if bits < 16:
            self.register_buffer("split", torch.tensor(1.0))
            self.register_buffer("offset", torch.tensor(0.0))

    def record(self) -> HybridRecord:
        return HybridRecord()

    def fault(self) -> str:
        fault = super().fault()
        if fault or self.bits >= 16:
            return fault
        usable = torch.isfinite(self.split) & torch.isfinite(self.offset) & (self.split > self.offset)
        return "" if bool(usable) else "no usable split"

    def set_grid(self, scale: Tensor, split: Tensor, offset: Tensor) -> None:
        """Sets the step of the uniform zone, and split and foot in steps (scalars)."""
        self.load_grid({"scale": scale.float(), "split": split.float(), "offset": offset.float()})

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        height = (x / scale).sub_(self.offset)
        rounded = round_hybrid(height, self.split - self.offset, zone_size(self.bits))
        return rounded.add_(self.offset).mul_(scale)

    def position(self, x: Tensor, scale: Tensor) -> tuple[Tensor, float, float]:
        # Below: half the first step of the log zone; above: half a step of the uniform zone.
        step, foot, split, count = scale.item(), self.offset.item(), self.split.item(), zone_size(self.bits)
        below = (split - foot) * 2.0 ** -(count - 2) / 2
        return x, step * (foot - below), step * (split + count + 0.5)

    def encode(self, x: Tensor) -> Tensor:
        count, width = zone_size(self.bits), self.split - self.offset
        height = x / self.scale - self.offset
        exponent = (height / width).clamp_(2.0 ** -(count + 1), 1).log2_().neg_().round_().clamp_(max=count - 1)
        return (count - 1 - exponent + (height - width).round_().clamp_(0, count)).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        count, width = zone_size(self.bits), self.split - self.offset
        codes = codes.float()
        log = torch.exp2(codes.clamp(max=count - 1) - (count - 1)) * (codes > 0)
        uniform = (codes - (count - 1)).clamp(min=0)
        return (log * width + uniform + self.offset) * self.scale


class HybridRecord(SiteRecord):
    """The record of a site with a log-uniform grid."""

    def fit(self, quantizer: HybridQuantizer, observer: str) -> None:
        """Searches foot, split and top for the least squared error, whatever the observer."""
        ends = torch.tensor(min(self.lows)), torch.tensor(max(self.highs))
        quantizer.set_grid(*search_hybrid(self.sample, *ends, quantizer.bits))


def search_hybrid(sample: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The log-uniform grid of least squared error on a sample: foot, split and top are searched.

    Args:
        sample: (n,) values of the site.
        low, high: Exact ends of the site's values (scalars).
        bits: Bits of a code, at least 3 (a zone of two codes has no logarithm).

    Returns:
        ``(scale, split, offset)`` of :class:`HybridQuantizer`.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    count = zone_size(bits)
    if high - low < 1e-8:
        return torch.tensor(1e-8), torch.tensor(1.0), torch.tensor(0.0)
    # Evenly spaced ranks instead of a histogram: bins of equal width are too coarse for the log zone.
    ranked = sample.float().sort().values
    values = even_ranks(ranked, SEARCH_VALUES)

    feet = low * torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]) if low < 0 else torch.zeros(1)
    tops, shares = torch.logspace(-1.3, 0, 12), torch.logspace(-2.5, -0.1, 24)
    foot, top, share = (v.flatten() for v in torch.meshgrid(feet, high * tops, shares, indexing="ij"))
    top = torch.maximum(top, foot + 1e-8)
    split = foot + (top - foot) * share
    scale = ((top - split) / count).clamp(min=1e-8)
    best_error, best = torch.inf, 0
    for part in torch.arange(len(foot)).split(256):
        s, f = scale[part, None], foot[part, None]
        rounded = round_hybrid((values - f) / s, (split[part, None] - f) / s, count).mul_(s).add_(f)
        errors = rounded.sub_(values).square_().sum(1)
        if errors.min() < best_error:
            best_error, best = errors.min(), part[errors.argmin()]
    return scale[best], split[best] / scale[best], foot[best] / scale[best]
