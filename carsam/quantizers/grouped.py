"""CAG, Channel-Aware Grouping (AHCPTQ, ICCV 2025, arXiv 2503.03088): one uniform grid per group of input channels."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from carsam.quantizers.affine import grid_from_range, qmax
from carsam.quantizers.ranges import observed_grid
from carsam.quantizers.record import SAMPLE_SIZE, Record
from carsam.quantizers.sampling import step_for
from carsam.quantizers.site import SiteQuantizer

GROUPS = 4


class GroupedQuantizer(SiteQuantizer):
    """Uniform quantizer with one step and zero point per group of channels (the last dimension).

    Finer than one grid per tensor: a matrix product then sums over groups with different steps, so rows of a table
    that use it say so.

    Buffers: ``scale`` (groups,) float32, ``zero_point`` (groups,) uint8, ``group`` (channels,) uint8, each channel's
    group.

    Args:
        bits: Bits of a code.
        always: Quantize regardless of the simulation.
        groups: Number of groups.
        channels: Channels of the site where known (a packed model); calibration finds them otherwise.
    """

    grid = "grouped"
    note = "per group of channels"
    arguments: ClassVar[dict[str, int]] = {"groups": 256, "channels": 2**20}

    def __init__(self, bits: int, *, always: bool = False, groups: int = GROUPS, channels: int = 0):
        super().__init__(bits, always=always)
        self.groups = groups
        if bits < 16:
            self.register_buffer("scale", torch.full((groups,), float("nan")))
            self.register_buffer("zero_point", torch.zeros(groups, dtype=torch.uint8))
            self.register_buffer("group", torch.zeros(channels, dtype=torch.uint8))

    def spec(self) -> dict[str, Any]:
        extra = {"groups": self.groups, "channels": self.group.numel()} if self.bits < 16 else {}
        return {**super().spec(), **extra}

    def record(self) -> ChannelRecord:
        return ChannelRecord()

    def fault(self) -> str:
        fault = super().fault()
        if fault or self.bits >= 16:
            return fault
        usable = self.group.numel() > 0 and int(self.group.max()) < self.scale.numel()
        return "" if usable else "no usable groups"

    def set_grid(self, scale: Tensor, zero_point: Tensor, group: Tensor) -> None:
        """Sets the groups' steps and zero points, (groups,) each, and the channels' groups, (channels,)."""
        self.load_grid(
            {"scale": scale, "zero_point": zero_point.to(torch.uint8), "group": group.to(torch.uint8)},
        )

    def step_along(self, x: Tensor) -> Tensor:
        # By autograd, the gradient of a group's step is the sum of its channels'.
        return self.step().index_select(0, self.group.int())

    def _zeros(self) -> Tensor:
        return self.zero_point.float().index_select(0, self.group.int())

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        zeros = self._zeros()
        return (x / scale).round_().add_(zeros).clamp_(0, qmax(self.bits)).sub_(zeros).mul_(scale)

    def position(self, x: Tensor, scale: Tensor) -> tuple[Tensor, float, float]:
        return (x / scale).add_(self._zeros()), -0.5, qmax(self.bits) + 0.5

    def encode(self, x: Tensor) -> Tensor:
        codes = (x / self.step_along(x)).round_().add_(self._zeros()).clamp_(0, qmax(self.bits))
        return codes.to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return (codes.float() - self._zeros()) * self.step_along(codes)


class ChannelRecord(Record):
    """Each channel's ends in every pass, and a sample of rows."""

    def __init__(self) -> None:
        self.lows: list[Tensor] = []
        self.highs: list[Tensor] = []
        self.samples: list[Tensor] = []

    @property
    def seen(self) -> bool:
        return bool(self.highs)

    def update(self, values: Tensor, **_: Any) -> None:
        """Takes the values of one forward pass (..., channels)."""
        rows = values.detach().flatten(0, -2)
        low, high = rows.aminmax(dim=0)
        self.lows.append(low.cpu())
        self.highs.append(high.cpu())
        self.samples.append(rows[:: step_for(rows.numel(), SAMPLE_SIZE)].to("cpu", torch.float32).clone())

    def fit(self, quantizer: GroupedQuantizer, observer: str) -> None:
        """Groups channels by their ranges, and gives each group the grid that the observer makes of its values."""
        lows, highs, sample = torch.stack(self.lows), torch.stack(self.highs), torch.cat(self.samples)
        group = group_channels(lows.amin(0), highs.amax(0), quantizer.groups)
        grids = []
        for index in range(quantizer.groups):
            members = group == index
            if not bool(members.any()):
                grids.append(grid_from_range(torch.tensor(0.0), torch.tensor(1.0), quantizer.bits))
                continue
            ends = lows[:, members].amin(1).float(), highs[:, members].amax(1).float()
            grids.append(observed_grid(observer, *ends, sample[:, members].flatten(), quantizer.bits))
        scales, zeros = zip(*grids)
        quantizer.set_grid(torch.stack(scales), torch.stack(zeros), group)


def group_channels(low: Tensor, high: Tensor, groups: int, *, rounds: int = 50) -> Tensor:
    """Clusters channels by their ranges: k-means over (low, high), started from evenly spaced ranks of the width.

    Args:
        low, high: (channels,) ends of each channel's range.
        groups: Number of clusters.
        rounds: Rounds of k-means.

    Returns:
        (channels,) cluster of each channel, int64. Clusters may be empty where channels are fewer than clusters or
        alike.
    """
    from scipy.cluster.vq import kmeans2  # takes a while to import

    points = torch.stack([low, high], dim=1).double()
    points = points / points.abs().max().clamp(min=1e-30)
    ranked = (high - low).argsort(stable=True)
    ranks = (torch.arange(groups, dtype=torch.float64) + 0.5) / groups * (len(ranked) - 1)
    centres = points[ranked[ranks.round().long()]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty clusters, whose centres stay where they are
        _, cluster = kmeans2(points.numpy(), centres.numpy(), iter=rounds, minit="matrix")
    return torch.from_numpy(cluster).long()
