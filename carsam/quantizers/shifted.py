"""A uniform grid with one step for the whole tensor that begins at another value in every channel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carsam.quantizers.affine import qmax
from carsam.quantizers.channel import ByChannel, MapsRecord
from carsam.quantizers.grouped import block_middles
from carsam.quantizers.sampling import odd_step_within

# Values that are kept from one forward pass, and those that stand for a channel in the search.
KEPT, VALUES = 2**16, 128
# Steps that are tried, as shares of the one that spans the widest channel, then of the best; and where a channel's grid
# may begin: over all that it does not reach, then within a step of the best.
FIRST, AROUND = torch.logspace(-1.5, 0, 10), torch.logspace(-0.15, 0.15, 7)
STARTS = 13


class Shift(NamedTuple):
    """Says that a site's grid is to be shifted; it stands where an observer's name may stand.

    Attributes:
        maps: 1 where the site holds maps (batch, channels, height, width); 0 where channels are last.
    """

    maps: int


class ShiftedQuantizer(ByChannel):
    """Uniform quantizer of x − μ, with one step, where μ has a value for every channel.

    x̂ = μ + s · clip(round((x − μ) / s), 0, qmax): μ is what the code 0 stands for. A Linear, or a convolution of single
    points, computes W x̂ = s · W codes + W μ, and W μ is part of its bias. So the integer arithmetic is that of one step
    and one zero point per tensor, and what is new is the subtraction of a vector. (Outlier Suppression+, EMNLP 2023,
    folds such a shift into the norm before; there is none behind an activation or a sum of two streams.)

    While the step is learned, the middle of every channel's grid stays where it is, and μ follows.

    Buffers: ``scale`` (float32 scalar), the step, and ``shift`` (channels,) float32, μ.
    """

    grid = "shifted"
    note = "shifted per channel"

    def buffers_of(self, channels: int) -> dict[str, Tensor]:
        return {"scale": torch.tensor(float("nan")), "shift": torch.zeros(channels)}

    def record(self) -> ShiftedRecord:
        return ShiftedRecord(self.maps)

    def fault(self) -> str:
        fault = super().fault()
        if fault or self.bits >= 16:
            return fault
        return "" if bool(torch.isfinite(self.shift).all()) else "no usable shift"

    def set_grid(self, scale: Tensor, shift: Tensor) -> None:
        """Sets the step (scalar) and where the grid begins in every channel, (channels,)."""
        self.load_grid({"scale": scale.float(), "shift": shift.float()})

    def origin(self) -> Tensor:
        return self.along(self.shift + qmax(self.bits) / 2 * self.scale)

    def settle(self) -> None:
        if self.learned is not None:
            self.shift.copy_(self._shift_at(self.step().detach()))
        super().settle()

    def _shift_at(self, scale: Tensor) -> Tensor:
        """Where the grid begins at a step that is being learned: it opens and closes about its middle.

        Held at its beginning, its far end would move by 2^bits - 1 times the change of a step, the near one not at all.
        """
        return self.shift + qmax(self.bits) / 2 * (self.scale - scale)

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        return self._steps(x, scale).mul_(scale).add_(self.along(self._shift_at(scale)))

    def _steps(self, x: Tensor, scale: Tensor) -> Tensor:
        return self._position(x, scale).round_().clamp_(0, qmax(self.bits))

    def _position(self, x: Tensor, scale: Tensor) -> Tensor:
        return (x - self.along(self._shift_at(scale))).div_(scale)

    def position(self, x: Tensor, scale: Tensor) -> tuple[Tensor, float | Tensor, float | Tensor]:
        return self._position(x, scale), -0.5, qmax(self.bits) + 0.5

    def scale_gradient(self, grad: Tensor, passed: Tensor, x: Tensor, out: Tensor, scale: Tensor) -> Tensor:
        # x̂ less the middle is the step times a value of a fixed set; where nothing was quantized both terms are equal.
        origin = self.origin()
        return super().scale_gradient(grad, passed, x - origin, out - origin, scale)

    def encode(self, x: Tensor) -> Tensor:
        return self._steps(x, self.scale).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float() * self.scale + self.along(self.shift)


class ShiftedRecord(MapsRecord):
    """Ends and samples of every channel, and how much the layer makes of an error there."""

    def __init__(self, maps: int):
        super().__init__(maps)
        self._weight: Tensor | None = None

    def update(self, values: Tensor, *, weight: Tensor | None = None, **context: Any) -> None:
        """Takes the values of one forward pass, and the layer's weight."""
        super().update(values, **context)
        if weight is not None:
            self._weight = weight.detach()

    def _step(self, rows: Tensor) -> int:
        return odd_step_within(len(rows), max(1, KEPT // rows.shape[1]))

    def fit(self, quantizer: ShiftedQuantizer, observer: Any) -> None:
        """Gives the site the grid of least squared error of the layer's output, channels' errors taken as independent.

        The observer has no say: ranges of a tensor are what it searches.
        """
        quantizer.set_grid(*self.shifted_grid(quantizer.bits, quantizer.scale.device))

    def shifted_grid(self, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Step and shift that the record makes; see :func:`shifted_grid`."""
        low, high = (
            torch.stack(self.lows).amin(0).float().to(device),
            torch.stack(self.highs).amax(0).float().to(device),
        )
        importance = torch.ones_like(low)
        if self._weight is not None:
            importance = self._weight.flatten(1).square().sum(0).to(low)
        return shifted_grid(torch.cat(self.samples).to(device), low, high, importance, bits)

    def rounded(self, rows: Tensor, bits: int) -> Tensor:
        """What rows (..., channels) are on that grid; a new tensor."""
        step, shift = self.shifted_grid(bits, rows.device)
        return (rows - shift).div_(step).round_().clamp_(0, qmax(bits)).mul_(step).add_(shift)


def shifted_grid(sample: Tensor, low: Tensor, high: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The grid of least weighed squared error with one step, each channel's beginning searched for each step tried.

    Args:
        sample: (n, channels) values.
        low, high: (channels,) exact ends.
        importance: (channels,) weights of the squared errors, not negative.
        bits: Bits of a code.

    Returns:
        Step (scalar) and shift (channels,).
    """
    ranked = sample.sort(dim=0).values
    middles = block_middles(ranked, VALUES)
    # The middles of blocks of equal rank stand for these; both ends stand for themselves alone.
    values = torch.cat([low[None], ranked[middles], high[None]]).T.contiguous()
    counts = torch.ones(values.shape[1], device=values.device)
    counts[1:-1] = len(ranked) / len(middles)
    levels = qmax(bits)

    def search(steps: Tensor, begins: Callable[[Tensor], Iterable[Tensor]]) -> tuple[Tensor, Tensor]:
        found, least = (steps[0], low), torch.inf
        for step in steps:
            errors, shift = torch.full_like(low, torch.inf), low
            for begin in begins(step):
                missing = (values - begin[:, None]).div_(step)
                error = missing.sub_(missing.round().clamp_(0, levels)).square_() @ counts
                better = error < errors
                errors, shift = torch.where(better, error, errors), torch.where(better, begin, shift)
            total = float((errors * importance).sum() * step.square())
            if total < least:
                found, least = (step, shift), total
        return found

    def anywhere(step: Tensor) -> Iterator[Tensor]:
        left = high - low - levels * step  # what the grid does not reach
        for share in torch.linspace(0, 1, STARTS).tolist():
            # Where the grid is wider than the channel, only where its codes lie between two values is open.
            yield low + torch.where(left > 0, share * left, (share - 0.5) * step)

    widest = ((high - low).max() / levels).clamp(min=1e-8)
    step, shift = search(widest * FIRST.to(widest), anywhere)
    middle = shift + levels / 2 * step

    def near(step: Tensor) -> Iterator[Tensor]:
        for moved in torch.linspace(-1, 1, STARTS).tolist():
            yield middle + (moved - levels / 2) * step

    return search(step * AROUND.to(step), near)
