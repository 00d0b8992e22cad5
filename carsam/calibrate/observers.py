"""Observers: from the values of a site over the whole calibration set to the range of its grid (METHOD.md, 2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from carsam.errors import ConfigError
from carsam.quantizers.grouped import GroupedQuantizer, group_channels
from carsam.quantizers.hybrid import HybridQuantizer, search_hybrid
from carsam.quantizers.simulation import simulate
from carsam.quantizers.site import SiteQuantizer
from carsam.quantizers.softmax import Log2Softmax, round_log2
from carsam.quantizers.uniform import ActivationQuantizer, decode, encode, grid_from_range

OBSERVERS = ("mse", "min-max", "moving-average", "percentile")
# Values of one site kept from one forward pass. Ranges come from the exact ends; the sample only weighs the inside.
SAMPLE_SIZE = 2**14
HISTOGRAM_BINS = 2048
PERCENTILE = 0.9999
# Heads of one forward pass, and queries of each, whose P is kept with V to choose a granularity by P̂V.
PROBABILITY_HEADS, PROBABILITY_ROWS = 2, 64


class SiteRecord:
    """What was seen at one activation site: exact ends of every pass, and an evenly strided sample of its values."""

    def __init__(self) -> None:
        self.lows: list[float] = []
        self.highs: list[float] = []
        self.samples: list[Tensor] = []

    def update(self, values: Tensor, **_: Any) -> None:
        """Takes the values of one forward pass (any shape)."""
        flat = values.detach().flatten()
        low, high = flat.aminmax()
        self.lows.append(low.item())
        self.highs.append(high.item())
        # An odd stride walks through all residues of the channel count instead of seeing the same channels again.
        stride = max(1, flat.numel() // SAMPLE_SIZE) | 1
        self.samples.append(flat[::stride].to("cpu", torch.float32).clone())

    def fit(self, quantizer: ActivationQuantizer, observer: str) -> None:
        """Sets the quantizer's grid to what the observer makes of the record."""
        quantizer.set_grid(*self.grid(quantizer.bits, observer))

    def grid(self, bits: int, observer: str) -> tuple[Tensor, Tensor]:
        """Step and zero point (scalars) of the site's grid.

        Args:
            bits: Bits of a code.
            observer: One of :data:`OBSERVERS`.

        Raises:
            ConfigError: The observer is unknown.
        """
        low, high = torch.tensor(min(self.lows)), torch.tensor(max(self.highs))
        if observer == "min-max":
            return grid_from_range(low, high, bits)
        if observer == "moving-average":
            # PTQ4SAM's AvgMinMaxObserver: the mean over batches of each batch's ends.
            return grid_from_range(torch.tensor(self.lows).mean(), torch.tensor(self.highs).mean(), bits)
        sample = torch.cat(self.samples)
        if observer == "percentile":
            ranked = sample.sort().values
            last = ranked.numel() - 1
            return grid_from_range(ranked[round((1 - PERCENTILE) * last)], ranked[round(PERCENTILE * last)], bits)
        if observer == "mse":
            return mse_grid(sample, low, high, bits)
        raise ConfigError(f"unknown observer {observer!r}; choose from {', '.join(OBSERVERS)}.")


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


class ChannelRecord:
    """What was seen at a site with a grid per group of channels: each channel's ends, and a sample of its values."""

    def __init__(self) -> None:
        self.lows: list[Tensor] = []
        self.highs: list[Tensor] = []
        self.samples: list[Tensor] = []

    def update(self, values: Tensor, **_: Any) -> None:
        """Takes the values of one forward pass (..., channels)."""
        rows = values.detach().flatten(0, -2)
        low, high = rows.aminmax(dim=0)
        self.lows.append(low.cpu())
        self.highs.append(high.cpu())
        step = max(1, rows.numel() // SAMPLE_SIZE)
        self.samples.append(rows[::step].to("cpu", torch.float32).clone())

    def fit(self, quantizer: GroupedQuantizer, observer: str) -> None:
        """Groups channels by their ranges, and gives each group the grid that the observer makes of its values."""
        lows, highs = torch.stack(self.lows), torch.stack(self.highs)
        group = group_channels(lows.amin(0), highs.amax(0), quantizer.groups)
        samples = torch.cat(self.samples)
        grids = []
        for index in range(quantizer.groups):
            members = group == index
            if not bool(members.any()):
                grids.append(grid_from_range(torch.tensor(0.0), torch.tensor(1.0), quantizer.bits))
                continue
            record = SiteRecord()
            record.lows = lows[:, members].amin(1).tolist()
            record.highs = highs[:, members].amax(1).tolist()
            record.samples = [samples[:, members].flatten()]
            grids.append(record.grid(quantizer.bits, observer))
        scales, zeros = zip(*grids)
        quantizer.set_grid(torch.stack(scales), torch.stack(zeros), group)


class HybridRecord(SiteRecord):
    """What was seen at a site with a log-uniform grid."""

    def fit(self, quantizer: HybridQuantizer, observer: str) -> None:
        """Searches foot, split and top for the least squared error, whatever the observer."""
        ends = torch.tensor(min(self.lows)), torch.tensor(max(self.highs))
        quantizer.set_grid(*search_hybrid(torch.cat(self.samples), *ends, quantizer.bits))


class ProbabilityRecord:
    """What was seen at a softmax with a log2 grid: the largest probability, and some rows of P with their V."""

    def __init__(self) -> None:
        self.highs: list[float] = []
        self.rows: list[tuple[Tensor, Tensor]] = []

    def update(self, values: Tensor, value: Tensor | None = None, **_: Any) -> None:
        """Takes the probabilities (..., queries, keys) of one forward pass and the values (..., keys, dim)."""
        self.highs.append(values.max().item())
        if value is None:
            return
        probs, value = values.detach().flatten(0, -3), value.detach().flatten(0, -3)
        # A few heads and rows of every pass: rows differ far more between images and heads than within one.
        for head in range(len(self.rows) % len(probs), len(probs), max(1, len(probs) // PROBABILITY_HEADS)):
            rows = probs[head, :: max(1, probs.shape[1] // PROBABILITY_ROWS)]
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


RECORDS = {
    ActivationQuantizer: SiteRecord,
    GroupedQuantizer: ChannelRecord,
    HybridQuantizer: HybridRecord,
    Log2Softmax: ProbabilityRecord,
}


class RangeRecorder:
    """Records the activation sites of some modules while a ``with recorder.recording()`` block runs the model."""

    def __init__(self, modules: list[nn.Module]):
        self.records = {
            part: RECORDS[type(part)]()
            for module in modules
            for part in module.modules()
            if isinstance(part, SiteQuantizer) and part.bits < 16
        }

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records every pass inside the block; quantizers of other modules are not touched."""

        def observe(quantizer: SiteQuantizer, values: Tensor, **context: Any) -> None:
            if quantizer in self.records:
                self.records[quantizer].update(values, **context)

        with torch.no_grad(), simulate(observe=observe):
            yield

    def apply(self, observer: str) -> None:
        """Sets the grids of all recorded sites.

        Raises:
            RuntimeError: A site saw no value: the recorded passes did not reach it.
        """
        for quantizer, record in self.records.items():
            if not record.highs:
                raise RuntimeError("an activation site saw no value during calibration; was its module run at all?")
            record.fit(quantizer, observer)
