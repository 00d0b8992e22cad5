"""Observers: from the values of a site over the whole calibration set to the range of its grid (METHOD.md, 2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from carsam.errors import ConfigError
from carsam.quantizers.simulation import simulate
from carsam.quantizers.uniform import ActivationQuantizer, decode, encode, grid_from_range

OBSERVERS = ("mse", "min-max", "moving-average", "percentile")
# Values of one site kept from one forward pass. Ranges come from the exact ends; the sample only weighs the inside.
SAMPLE_SIZE = 2**14
HISTOGRAM_BINS = 2048
PERCENTILE = 0.9999


class SiteRecord:
    """What was seen at one activation site: exact ends of every pass, and an evenly strided sample of its values."""

    def __init__(self) -> None:
        self.lows: list[float] = []
        self.highs: list[float] = []
        self.samples: list[Tensor] = []

    def update(self, values: Tensor) -> None:
        """Takes the values of one forward pass (any shape)."""
        flat = values.detach().flatten()
        low, high = flat.aminmax()
        self.lows.append(low.item())
        self.highs.append(high.item())
        # An odd stride walks through all residues of the channel count instead of seeing the same channels again.
        stride = max(1, flat.numel() // SAMPLE_SIZE) | 1
        self.samples.append(flat[::stride].to("cpu", torch.float32).clone())

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


class RangeRecorder:
    """Records the activation sites of some modules while a ``with recorder.recording()`` block runs the model."""

    def __init__(self, modules: list[nn.Module]):
        self.records = {
            part: SiteRecord()
            for module in modules
            for part in module.modules()
            if isinstance(part, ActivationQuantizer) and part.bits < 16
        }

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records every pass inside the block; quantizers of other modules are not touched."""

        def observe(quantizer: ActivationQuantizer, values: Tensor) -> None:
            if quantizer in self.records:
                self.records[quantizer].update(values)

        with torch.no_grad(), simulate(observe=observe):
            yield

    def apply(self, observer: str) -> None:
        """Sets the grids of all recorded sites.

        Raises:
            RuntimeError: A site saw no value: the recorded passes did not reach it.
        """
        for quantizer, record in self.records.items():
            if not record.lows:
                raise RuntimeError("an activation site saw no value during calibration; was its module run at all?")
            quantizer.set_grid(*record.grid(quantizer.bits, observer))
