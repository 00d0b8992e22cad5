"""One uniform grid for every channel of a depthwise convolution's input."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from carsam.quantizers.affine import decode, encode, qmax
from carsam.quantizers.grouped import ChannelRecord, channel_grids
from carsam.quantizers.sampling import odd_step_within
from carsam.quantizers.site import SiteQuantizer

# Places of a map whose values are kept from one forward pass.
PLACES = 2048


class ByChannel(SiteQuantizer):
    """Base of the grids that have something of their own for every channel.

    Channels are the second dimension of maps (batch, channels, height, width) with ``maps``, the last otherwise.

    Args:
        bits: Bits of a code.
        always: Quantize regardless of the simulation.
        channels: Channels of the site where known (a packed model); calibration finds them otherwise.
        maps: 1 where the site holds maps, with channels before height and width.
    """

    arguments: ClassVar[dict[str, int]] = {"channels": 2**20, "maps": 1}
    per_channel = True

    def __init__(self, bits: int, *, always: bool = False, channels: int = 1, maps: int = 0):
        super().__init__(bits, always=always)
        self.maps = maps
        if bits < 16:
            for name, value in self.buffers_of(channels).items():
                self.register_buffer(name, value)

    def buffers_of(self, channels: int) -> dict[str, Tensor]:
        """Buffers of a grid that is not set yet; the last has a value for every channel."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        extra = {"channels": list(self.buffers())[-1].numel(), "maps": self.maps} if self.bits < 16 else {}
        return {**super().spec(), **extra}

    def along(self, values: Tensor) -> Tensor:
        """(channels,) as it broadcasts against the site's values."""
        return values[:, None, None] if self.maps else values


class ChannelQuantizer(ByChannel):
    """Uniform quantizer with a step and a zero point for every channel.

    A depthwise convolution computes each output channel from one input channel. So the step of that channel is a factor
    of its output, as the step of its weights is: the integer arithmetic is that of one step per tensor. Elsewhere a sum
    would run over channels of different steps.

    Buffers: ``scale`` (channels,) float32, ``zero_point`` (channels,) uint8.
    """

    grid = "channel"
    note = "per channel"

    def buffers_of(self, channels: int) -> dict[str, Tensor]:
        return {
            "scale": torch.full((channels,), float("nan")),
            "zero_point": torch.zeros(channels, dtype=torch.uint8),
        }

    def record(self) -> ChannelsRecord:
        return ChannelsRecord(self.maps)

    def set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Sets steps and zero points, (channels,) each."""
        self.load_grid({"scale": scale.float(), "zero_point": zero_point.to(torch.uint8)})

    def step_along(self, x: Tensor) -> Tensor:
        return self.along(self.step())

    def _zeros(self) -> Tensor:
        return self.along(self.zero_point.float())

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        zeros = self._zeros()
        return (x / scale).round_().add_(zeros).clamp_(0, qmax(self.bits)).sub_(zeros).mul_(scale)

    def position(self, x: Tensor, scale: Tensor) -> tuple[Tensor, float | Tensor, float | Tensor]:
        return (x / scale).add_(self._zeros()), -0.5, qmax(self.bits) + 0.5

    def scale_gradient(self, grad: Tensor, passed: Tensor, x: Tensor, out: Tensor, scale: Tensor) -> Tensor:
        if self.maps:
            others = (0, 2, 3)
            return ((grad * out).sum(others) - (passed * x).sum(others))[:, None, None] / scale
        return super().scale_gradient(grad, passed, x, out, scale)

    def encode(self, x: Tensor) -> Tensor:
        return encode(x, self.step_along(x), self._zeros(), self.bits).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return decode(codes.float(), self.step_along(codes), self._zeros())


class MapsRecord(ChannelRecord):
    """Ends and samples of every channel of maps, or of channels that are last.

    Args:
        maps: As :class:`ByChannel` takes it.
    """

    def __init__(self, maps: int):
        super().__init__()
        self._maps = maps

    def update(self, values: Tensor, **context: Any) -> None:
        """Takes the values of one forward pass, channels where the quantizer has them."""
        super().update(values.permute(0, 2, 3, 1) if self._maps else values, **context)


class ChannelsRecord(MapsRecord):
    """Ends and samples of every channel, and each channel's own grid."""

    def _step(self, rows: Tensor) -> int:
        return odd_step_within(len(rows), PLACES)

    def fit(self, quantizer: ChannelQuantizer, observer: str) -> None:
        """Gives each channel the grid that the observer makes of its values."""
        device = quantizer.scale.device
        lows, highs = (torch.stack(ends).float().to(device) for ends in (self.lows, self.highs))
        sample = torch.cat(self.samples).to(device)
        quantizer.set_grid(*channel_grids(observer, lows, highs, sample, quantizer.bits))
