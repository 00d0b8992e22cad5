"""CAG, Channel-Aware Grouping (AHCPTQ, ICCV 2025, arXiv 2503.03088): one uniform grid per group of input channels."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from carsam.quantizers.affine import decode, encode, grid_from_range, qmax
from carsam.quantizers.ranges import PERCENTILE, observed_grid
from carsam.quantizers.record import SAMPLE_SIZE, Record
from carsam.quantizers.sampling import odd_step_for
from carsam.quantizers.site import SiteQuantizer

GROUPS = 4
# From which share of a unit's steps on there are how many times as many groups as in the end (the public code's).
SCHEDULE = ((0.2, 8), (0.4, 4), (0.6, 2), (0.8, 1))
# What k-means tells channels apart by: the steps and zero points of their grids as they are (the public code's), or
# the ends of their grids, which are on one scale.
GROUP_BY = ("grids", "ranges")
# The grid of a merged group: the mean of its members' (the public code's), or that with the step of least error.
MERGED_BY = ("mean", "error")
# Times the mean step that are tried for it: a mean clips the widest members, which few steps of learning cannot mend.
MERGED_FACTORS = torch.logspace(-1, 2, 19, base=2)
MERGED_VALUES = 64
# Values that stand for a channel in the search of its range, and shares of each end that are tried in a round.
CHANNEL_VALUES, CHANNEL_SHARES = 512, 8


class GroupedQuantizer(SiteQuantizer):
    """Uniform quantizer with one step and zero point per group of channels (the last dimension).

    Finer than one grid per tensor: a matrix product then sums over groups with different steps, so rows of a table
    that use it say so.

    With ``progressive``, learning starts from a grid for every channel, whose steps are learned; on the way channels
    are grouped, and groups merged, by :data:`SCHEDULE`. What is packed has ``groups`` grids.

    Buffers: ``scale`` (groups,) float32, ``zero_point`` (groups,) uint8, ``group`` (channels,) uint8, each channel's
    group.

    Args:
        bits: Bits of a code.
        always: Quantize regardless of the simulation.
        groups: Number of groups.
        channels: Channels of the site where known (a packed model); calibration finds them otherwise.
        progressive: Group while steps are learned; otherwise once, before.
        by: What groups have in common, one of :data:`GROUP_BY`.
        merged_by: The grid of a merged group, one of :data:`MERGED_BY`.
    """

    grid = "grouped"
    note = "per group of channels"
    arguments: ClassVar[dict[str, int]] = {"groups": 256, "channels": 2**20}
    per_channel = True

    def __init__(
        self,
        bits: int,
        *,
        always: bool = False,
        groups: int = GROUPS,
        channels: int = 0,
        progressive: bool = False,
        by: str = "ranges",
        merged_by: str = "mean",
    ):
        super().__init__(bits, always=always)
        assert by in GROUP_BY and merged_by in MERGED_BY, (by, merged_by)
        self.groups, self.progressive, self.by, self.merged_by = groups, progressive, by, merged_by
        # Step and zero point of every channel as observed, with some values of each (channels, n); and, while steps are
        # learned, what is in force.
        self.observed: tuple[Tensor, Tensor, Tensor] | None = None
        self._merging: _Merging | None = None
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

    def learn_scale(self, *, relative: bool = True) -> nn.Parameter:
        if not self.progressive or self.observed is None:
            return super().learn_scale(relative=relative)
        self.relative = relative
        scale, zero, values = self.observed
        self._merging = _Merging(zero, values)
        self.learned = nn.Parameter(self._stored(scale))
        return self.learned

    def _stored(self, scale: Tensor) -> Tensor:
        """A step as the parameter holds it."""
        return scale.log() if self.relative else scale.clone()

    def step(self) -> Tensor:
        if self._merging is None or self.learned is None:
            return super().step()
        # Grouped channels share the mean of their parameters: they start equal and get one gradient.
        values = self._merging.shared(self.learned)
        return values.exp() if self.relative else values.clamp(min=1e-8)

    @torch.no_grad()
    def advance(self, share: float) -> bool:
        merging, changed = self._merging, False
        while merging is not None and merging.stage < len(SCHEDULE) and share >= SCHEDULE[merging.stage][0]:
            groups = self.groups * SCHEDULE[merging.stage][1]
            merging.stage += 1
            if groups < merging.zero.numel():
                scale, zero, group = group_grids(self.step(), merging.zero, groups, self.bits, self.by)
                merging.merge(zero[group], group, groups)
                if self.merged_by == "error":
                    scale = scale * merging.best_factors(scale[group], self.bits)
                self.learned.copy_(self._stored(scale[group]))
                changed = True
        return changed

    def settle(self) -> None:
        if self.learned is None or self._merging is None:
            super().settle()
            return
        self.advance(1.0)
        scale, zero = self.step().detach(), self._merging.zero
        group = self._merging.group
        if group is None:  # fewer channels than groups: one for each
            group = torch.arange(len(scale), device=scale.device)
        # A group that lost all of its channels needs a grid that a file may hold.
        scales, zeros = torch.ones_like(self.scale), torch.zeros_like(self.scale)
        scales[group], zeros[group] = scale, zero
        self.learned = self._merging = self.observed = None
        self.set_grid(scales, zeros, group)

    def step_along(self, x: Tensor) -> Tensor:
        if self._merging is not None:
            return self.step()
        # By autograd, the gradient of a group's step is the sum of its channels'.
        return self.step().index_select(0, self.group.int())

    def _zeros(self) -> Tensor:
        if self._merging is not None:
            return self._merging.zero
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


class _Merging:
    """Channels on their way into groups: zero points in force (channels,), and who shares a step with whom.

    Args:
        zero: Zero points to begin with.
        values: (channels, n) values that stand for each channel.
    """

    def __init__(self, zero: Tensor, values: Tensor):
        self.zero, self.values, self.stage = zero, values, 0
        self.group: Tensor | None = None
        self._members: Tensor | None = None
        self._means: Tensor | None = None

    def merge(self, zero: Tensor, group: Tensor, groups: int) -> None:
        """Takes new zero points and groups, (channels,) each."""
        self.zero, self.group = zero, group
        members = nn.functional.one_hot(group, groups).to(zero.dtype)
        # Products with whole matrices, as sums by index have no fixed order on a GPU.
        self._members, self._means = members, (members / members.sum(0).clamp(min=1)).T.contiguous()

    def best_factors(self, scale: Tensor, bits: int) -> Tensor:
        """Factors of the groups' steps for the least squared error on all members' values, (groups,).

        Args:
            scale: (channels,) steps, those of a group alike.
            bits: Bits of a code.
        """
        factors, zero = MERGED_FACTORS.to(scale), self.zero[:, None]
        errors = []
        for factor in factors:
            step = (scale * factor)[:, None]
            errors.append(decode(encode(self.values, step, zero, bits), step, zero).sub_(self.values).square_().sum(1))
        return factors[(torch.stack(errors) @ self._members).argmin(0)]

    def shared(self, values: Tensor) -> Tensor:
        """The mean of each channel's group, (channels,) to (channels,)."""
        return values if self._members is None else self._members @ (self._means @ values)


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
        self.samples.append(rows[:: self._step(rows)].to("cpu", torch.float32).clone())

    def _step(self, rows: Tensor) -> int:
        """Between the rows (n, channels) that are kept: odd, since one that divides a map's width sees one column."""
        return odd_step_for(rows.numel(), SAMPLE_SIZE)

    def fit(self, quantizer: GroupedQuantizer, observer: str) -> None:
        """Gives each channel the grid that the observer makes of its values, and groups channels by these.

        A progressive quantizer starts to learn from the channels' grids. Until then, and without learning, a group has
        the grid that the observer makes of all of its values.
        """
        lows, highs = torch.stack(self.lows).float(), torch.stack(self.highs).float()
        sample, bits, device = torch.cat(self.samples), quantizer.bits, quantizer.scale.device
        grids = channel_grids(observer, lows.to(device), highs.to(device), sample.to(device), bits)
        ranked = sample.to(device).sort(dim=0).values
        quantizer.observed = (*grids, ranked[block_middles(ranked, MERGED_VALUES)].T.contiguous())
        *_, group = group_grids(*grids, quantizer.groups, bits, quantizer.by)
        group = group.cpu()
        found = []
        for index in range(quantizer.groups):
            members = group == index
            if not bool(members.any()):
                found.append(grid_from_range(torch.tensor(0.0), torch.tensor(1.0), bits))
                continue
            ends = lows[:, members].amin(1), highs[:, members].amax(1)
            found.append(observed_grid(observer, *ends, sample[:, members].flatten(), bits))
        scales, zeros = zip(*found)
        quantizer.set_grid(torch.stack(scales), torch.stack(zeros), group)


def channel_grids(observer: str, lows: Tensor, highs: Tensor, sample: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and zero point of every channel, (channels,) each, that an observer makes of its values.

    Args:
        observer: One of :data:`carsam.quantizers.ranges.OBSERVERS`.
        lows, highs: (passes, channels) ends of every pass.
        sample: (n, channels) values.
        bits: Bits of a code.
    """
    low, high = lows.amin(0), highs.amax(0)
    if observer == "moving-average":
        low, high = lows.mean(0), highs.mean(0)
    elif observer in ("percentile", "mse"):
        ranked = sample.sort(dim=0).values
        if observer == "mse":
            return mse_grids(ranked, low, high, bits)
        last = len(ranked) - 1
        low, high = ranked[round((1 - PERCENTILE) * last)], ranked[round(PERCENTILE * last)]
    return grid_from_range(low, high, bits)


def block_middles(ranked: Tensor, most: int) -> Tensor:
    """The middle ranks of at most so many blocks of equal size, for values sorted along the first dimension."""
    blocks = min(len(ranked), most)
    return ((torch.arange(blocks, device=ranked.device) + 0.5) * (len(ranked) / blocks)).long()


def mse_grids(ranked: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """For each of many channels the grid of least squared error on its values, both ends shrunk independently.

    Args:
        ranked: (n, channels) values, each channel's sorted.
        low, high: (channels,) exact ends.
        bits: Bits of a code.

    Returns:
        Step and zero point, (channels,) each.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    # The middles of blocks of equal rank stand for these; both ends stand for themselves alone.
    middles = block_middles(ranked, CHANNEL_VALUES)
    values = torch.cat([ranked[:1], ranked[middles], ranked[-1:]]).T.contiguous()
    weights = torch.ones(len(middles) + 2, device=ranked.device)
    weights[1:-1] = len(ranked) / len(middles)
    best_low, best_high = torch.ones_like(low), torch.ones_like(high)
    factor = 1.3 / (CHANNEL_SHARES - 1)
    for shares in (torch.logspace(-1.3, 0, CHANNEL_SHARES), torch.logspace(-factor, factor, CHANNEL_SHARES)):
        of_low, of_high = best_low.clone(), best_high.clone()
        least = torch.full_like(low, torch.inf)
        for low_share in shares.tolist():
            for high_share in shares.tolist():
                tried_low, tried_high = (of_low * low_share).clamp(max=1), (of_high * high_share).clamp(max=1)
                grid = [part[:, None] for part in grid_from_range(low * tried_low, high * tried_high, bits)]
                error = decode(encode(values, *grid, bits), *grid).sub_(values).square_() @ weights
                better = error < least
                least = torch.where(better, error, least)
                best_low = torch.where(better, tried_low, best_low)
                best_high = torch.where(better, tried_high, best_high)
    return grid_from_range(low * best_low, high * best_high, bits)


def group_grids(scale: Tensor, zero_point: Tensor, groups: int, bits: int, by: str) -> tuple[Tensor, Tensor, Tensor]:
    """Groups grids by k-means; a group's grid is the centre of its members.

    Args:
        scale, zero_point: (channels,) each.
        groups: Number of groups.
        bits: Bits of a code.
        by: ``grids``: over (scale, zero point) as they are, in which the zero points, whole numbers up to 2^bits − 1,
            outweigh the steps; ``ranges``: over the ends of the grids.

    Returns:
        Scale and zero point, (groups,) each, and the group of each channel, (channels,) int64.
    """
    if by == "grids":
        centres, group = k_means(torch.stack([scale, zero_point], dim=1), groups)
        return centres[:, 0], centres[:, 1].round(), group
    low, high = -zero_point * scale, (qmax(bits) - zero_point) * scale
    centres, group = k_means(torch.stack([low, high], dim=1), groups)
    return *grid_from_range(centres[:, 0], centres[:, 1], bits), group


def k_means(points: Tensor, groups: int, *, rounds: int = 50) -> tuple[Tensor, Tensor]:
    """k-means from evenly spaced ranks of the points' spread: nothing is random.

    Args:
        points: (n, 2).
        groups: Number of clusters.
        rounds: Rounds at most.

    Returns:
        Centres (groups, 2) like the points, and the cluster of each point, (n,) int64. Clusters may be empty where
        points are fewer than clusters or alike.
    """
    from scipy.cluster.vq import kmeans2  # takes a while to import

    values = points.detach().double().cpu()
    ranked = (values[:, 1] - values[:, 0]).argsort(stable=True)
    ranks = (torch.arange(groups, dtype=torch.float64) + 0.5) / groups * (len(ranked) - 1)
    start = values[ranked[ranks.round().long()]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty clusters, whose centres stay where they are
        centres, cluster = kmeans2(values.numpy(), start.numpy(), iter=rounds, minit="matrix")
    return torch.from_numpy(centres).to(points), torch.from_numpy(cluster).to(points.device, torch.int64)
