"""What equivalences are computed from: statistics of every channel over the calibration images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carsam.models.family import ENCODED, Family, Tensors
from carsam.models.forward import encode_image
from carsam.models.sites import AttentionSite, Sites
from carsam.prompts.calibration import CalibrationImage, CalibrationSet

OPERANDS = ("query", "key", "value")
# Large images on which the encoder is watched.
FEW = 3


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


def enough_in_encoder(data: CalibrationSet, index: int) -> bool:
    """Whether images before this one show enough of the encoder, so that the decoder alone need be watched on it.

    A large image has as many tokens as several small ones, and a pass of the encoder over it takes seconds (ViT-B's 15
    of one thread). Images for the decoder differ by their prompts as well, and it costs little.
    """
    return data.images[index].large and index >= FEW


def spared_embedding(data: CalibrationSet, index: int) -> Tensor | None:
    """An image's embedding where it is known and the encoder need not be watched: it spares a pass of the encoder."""
    return data.embedding(index) if enough_in_encoder(data, index) else None


def pass_over(
    model: nn.Module, sites: Sites, image: CalibrationImage, embedding: Tensor | None = None
) -> Tensors | None:
    """One pass over an image with its prompts, from its embedding where that reaches all sites.

    Args:
        model: Float model.
        sites: The sites that are to be reached.
        image: A calibration image.
        embedding: What the encoder gives, if that is known and the encoder need not be watched.

    Returns:
        What the encoder gave; None where the pass is the family's own.
    """
    # Asked of the family's code, not by trying: layers of the encoder that are watched must be reached once.
    decodes = type(sites.family).decode is not Family.decode
    if decodes and not sites.memory_stages:
        with torch.no_grad():
            if embedding is None:
                embedding = encode_image(model, image.pixel_values.to(model.device))
            encoded = {ENCODED: embedding.to(model.device)}
            if sites.family.decode(model, encoded, image) is not None:
                return encoded
    sites.family.forward(model, image)
    return None


@contextmanager
def hooked(model: nn.Module, hooks: Iterable[tuple[str, Callable[[Tensor, Tensor], None]]]) -> Iterator[None]:
    """While the block runs, hooks ``(path, hook)`` are called with the input and the output of the module there."""
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _module, args, out, hook=hook: hook(args[0], out))
        for path, hook in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def operand_statistics(
    model: nn.Module, attentions: Iterable[AttentionSite], *, pairs: bool = False
) -> tuple[dict[str, ChannelStatistics], list[tuple[str, Callable[[Tensor, Tensor], None]]]]:
    """Statistics of queries, keys and values by the name of the site, and the hooks that fill them.

    Args:
        model: Float model.
        attentions: Which attentions.
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
    return found, hooks


def input_statistics(
    model: nn.Module, layers: Iterable[str]
) -> tuple[dict[str, ChannelStatistics], list[tuple[str, Callable[[Tensor, Tensor], None]]]]:
    """Statistics of the inputs of layers by module path, and the hooks that fill them.

    Channels of convolutions are their maps.
    """
    found: dict[str, ChannelStatistics] = {}
    hooks = []
    for path in layers:
        statistics = found.setdefault(path, ChannelStatistics())
        maps = isinstance(model.get_submodule(path), nn.Conv2d)
        hooks.append(
            (path, lambda x, _out, into=statistics, maps=maps: into.update(x.permute(0, 2, 3, 1) if maps else x))
        )
    return found, hooks
