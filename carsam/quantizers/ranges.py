"""From what was seen at a site to step and zero point of a uniform grid (METHOD.md, 2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from carsam.errors import ConfigError
from carsam.quantizers.affine import decode, encode, grid_from_range

HISTOGRAM_BINS = 2048
PERCENTILE = 0.9999


class Range(NamedTuple):
    """Ends of a grid that something else than an observer decided; it stands where an observer's name may stand."""

    low: float
    high: float


def observed_grid(
    observer: str | Range, lows: Tensor, highs: Tensor, sample: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Step and zero point (scalars) that an observer makes of a site's values.

    Args:
        observer: One of :data:`OBSERVERS`, or the range itself.
        lows, highs: (passes,) exact ends of the values of every forward pass.
        sample: (n,) values of all passes.
        bits: Bits of a code.

    Raises:
        ConfigError: The observer is unknown.
    """
    if isinstance(observer, Range):
        return grid_from_range(torch.tensor(observer.low), torch.tensor(observer.high), bits)
    if observer not in OBSERVERS:
        raise ConfigError(f"unknown observer {observer!r}; choose from {', '.join(OBSERVERS)}.")
    return OBSERVERS[observer](lows, highs, sample, bits)


def _mse(lows: Tensor, highs: Tensor, sample: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return mse_grid(sample, lows.min(), highs.max(), bits)


def _min_max(lows: Tensor, highs: Tensor, sample: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return grid_from_range(lows.min(), highs.max(), bits)


def _moving_average(lows: Tensor, highs: Tensor, sample: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    # PTQ4SAM's AvgMinMaxObserver: the mean over batches of each batch's ends.
    return grid_from_range(lows.mean(), highs.mean(), bits)


def _percentile(lows: Tensor, highs: Tensor, sample: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    ranked = sample.sort().values
    last = ranked.numel() - 1
    return grid_from_range(ranked[round((1 - PERCENTILE) * last)], ranked[round(PERCENTILE * last)], bits)


OBSERVERS = {"mse": _mse, "min-max": _min_max, "moving-average": _moving_average, "percentile": _percentile}


def mse_grid(sample: Tensor, low: Tensor, high: Tensor, bits: int, *, candidates: int = 24) -> tuple[Tensor, Tensor]:
    """The grid of least squared error on a sample, both ends shrunk independently.

    The error is weighed on a histogram, so the search costs the same for any number of values. Two rounds: a coarse
    search in ratios (the best range of an outlier-ridden site can be a hundredth of its range), then a fine one.

    Args:
        sample: (n,) values.
        low, high: Exact ends of the site's values (scalars).
        bits: Bits of a code.
        candidates: Shares of each end tried per round.

    Returns:
        Step and zero point (scalars).
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if high - low < 1e-8:
        return grid_from_range(low, high, bits)
    counts = torch.histc(sample, HISTOGRAM_BINS, low.item(), high.item())
    width = (high - low) / HISTOGRAM_BINS
    centres = low + width * (torch.arange(HISTOGRAM_BINS) + 0.5)
    occupied = counts > 0
    counts, centres = counts[occupied], centres[occupied]

    def search(low_shares: Tensor, high_shares: Tensor) -> tuple[Tensor, Tensor]:
        lows, highs = torch.meshgrid(low * low_shares, high * high_shares, indexing="ij")
        scale, zero = grid_from_range(lows.flatten(), highs.flatten(), bits)
        error = decode(encode(centres[None], scale[:, None], zero[:, None], bits), scale[:, None], zero[:, None])
        error = error.sub_(centres).square_() @ counts
        best = error.argmin().item()
        return low_shares[best // len(high_shares)], high_shares[best % len(high_shares)]

    shares = torch.logspace(-2, 0, candidates) if candidates > 1 else torch.ones(1)
    one = torch.ones(1)
    best_low, best_high = search(shares if low < 0 else one, shares if high > 0 else one)
    factor = (shares[1] / shares[0]).item() if candidates > 1 else 1.0
    fine = torch.logspace(-1, 1, candidates, base=factor)
    best_low, best_high = search(
        (best_low * fine).clamp(max=1) if low < 0 else one, (best_high * fine).clamp(max=1) if high > 0 else one
    )
    return grid_from_range(low * best_low, high * best_high, bits)
