"""What equivalences are computed from: statistics of every channel over the calibration images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carsam.models.sites import AttentionSite, Sites
from carsam.prompts.calibration import CalibrationSet

OPERANDS = ("query", "key", "value")


@dataclass
class ChannelStatistics:
    """Sums over all tokens, per channel (channels,) in float64; ends in float32.

    With ``pairs``, products of every two channels are summed as well.
    """

    pairs: bool = False
    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    low: Tensor | None = None
    high: Tensor | None = None
    products: Tensor | float = 0.0

    def update(self, values: Tensor) -> None:
        """Takes values (..., channels)."""
        rows = values.detach().flatten(0, -2)
        self.count += len(rows)
        self.total = self.total + rows.sum(0, dtype=torch.float64)
        self.squares = self.squares + rows.double().square().sum(0)
        if self.pairs:
            self.products = self.products + (rows.T @ rows).double()
        low, high = rows.aminmax(dim=0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    @property
    def mean(self) -> Tensor:
        """Mean of every channel."""
        return self.total / self.count

    @property
    def rms(self) -> Tensor:
        """Root of the mean square."""
        return (self.squares / self.count).sqrt()

    @property
    def std(self) -> Tensor:
        """Standard deviation."""
        return (self.squares / self.count - self.mean.square()).clamp(min=0).sqrt()

    @property
    def moments(self) -> Tensor:
        """Mean products of every two channels, (channels, channels)."""
        return self.products / self.count

    @property
    def covariance(self) -> Tensor:
        """The same around the mean."""
        return self.moments - self.mean[:, None] * self.mean[None]

    @property
    def reach(self) -> Tensor:
        """Largest absolute value."""
        return torch.maximum(self.low.abs(), self.high.abs())


def run_hooked(
    model: nn.Module,
    sites: Sites,
    data: CalibrationSet,
    hooks: Iterable[tuple[str, Callable[[Tensor, Tensor], None]]],
    images: int | None = None,
) -> None:
    """Runs the model over calibration images while hooks look at the inputs and outputs of layers.

    Args:
        model: Float model.
        sites: Its sites.
        data: Calibration images.
        hooks: ``(path, hook)``; the hook is called with the input and the output of the module at the path.
        images: Only so many of the images.
    """
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _module, args, out, hook=hook: hook(args[0], out))
        for path, hook in hooks
    ]
    try:
        for image in data.images[:images]:
            sites.family.forward(model, image)
    finally:
        for handle in handles:
            handle.remove()


def operand_statistics(
    model: nn.Module,
    sites: Sites,
    data: CalibrationSet,
    attentions: Iterable[AttentionSite],
    images: int | None = None,
    *,
    pairs: bool = False,
) -> dict[str, ChannelStatistics]:
    """Statistics of queries, keys and values by the name of the site, in one pass.

    Args:
        model: Float model.
        sites: Its sites.
        data: Calibration images with their prompts.
        attentions: Which of them.
        images: Only so many of the images.
        pairs: Sum products of every two channels as well.
    """
    found: dict[str, ChannelStatistics] = {}
    hooks = []
    for site in attentions:
        for which in OPERANDS:
            projection = getattr(site, which)
            rows = projection.rows(model.get_submodule(projection.layer).out_features)
            statistics = found.setdefault(site.operand(which), ChannelStatistics(pairs))
            hooks.append(
                (projection.layer, lambda _in, out, rows=rows, into=statistics: into.update(out.detach()[..., rows]))
            )
    run_hooked(model, sites, data, hooks, images)
    return found


def input_statistics(
    model: nn.Module, sites: Sites, data: CalibrationSet, layers: Iterable[str], images: int | None = None
) -> dict[str, ChannelStatistics]:
    """Statistics of the inputs of layers by module path, in one pass; channels of convolutions are their maps."""
    found: dict[str, ChannelStatistics] = {}
    hooks = []
    for path in layers:
        statistics = found.setdefault(path, ChannelStatistics())
        maps = isinstance(model.get_submodule(path), nn.Conv2d)
        hooks.append(
            (path, lambda x, _out, into=statistics, maps=maps: into.update(x.permute(0, 2, 3, 1) if maps else x))
        )
    run_hooked(model, sites, data, hooks, images)
    return found
