"""The projections of an attention's query, key and value, changed head by head; what a family's table forbids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carsam.errors import ConfigError
from carsam.models.sites import AttentionSite, Projection


class Refused(ConfigError):
    """An equivalence that does not hold for this family, with the reason."""


@dataclass(frozen=True)
class Operand:
    """The output channels of a layer that project one operand of an attention.

    Attributes:
        layer: The Linear.
        rows: Its output channels that are the operand's.
        heads: Heads that these channels are split into, one after the other.
    """

    layer: nn.Linear
    rows: slice
    heads: int

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return len(self) // self.heads

    @torch.no_grad()
    def shift(self, offset: Tensor) -> None:
        """Adds ``offset`` (channels,) to what the projection gives.

        Raises:
            Refused: The layer has no bias that could take it.
        """
        if self.layer.bias is None:
            raise Refused("a projection without a bias cannot be shifted: its packed form has no place for one.")
        self.layer.bias[self.rows] += offset.to(self.layer.bias)

    @torch.no_grad()
    def scale(self, factor: Tensor) -> None:
        """Multiplies what the projection gives by ``factor`` (channels,)."""
        factor = factor.to(self.layer.weight)
        self.layer.weight[self.rows] *= factor[:, None]
        if self.layer.bias is not None:
            self.layer.bias[self.rows] *= factor

    @torch.no_grad()
    def map(self, matrices: Tensor) -> None:
        """x ← x M for every head, ``matrices`` (heads, head_dim, head_dim)."""
        transposed = matrices.double().transpose(-2, -1).to(self.layer.weight.device)

        def mapped(values: Tensor) -> Tensor:
            per_head = values.double().unflatten(0, (self.heads, self.head_dim)).flatten(2)
            return (transposed @ per_head).flatten(0, 1).view(values.shape).to(values.dtype)

        self.layer.weight[self.rows] = mapped(self.layer.weight[self.rows])
        if self.layer.bias is not None:
            self.layer.bias[self.rows] = mapped(self.layer.bias[self.rows, None])[:, 0]


def heads_of(model: nn.Module, site: AttentionSite) -> int:
    """Heads of an attention."""
    return int(model.get_submodule(site.name).num_attention_heads)


def operand(model: nn.Module, site: AttentionSite, which: str) -> Operand:
    """``query``, ``key`` or ``value`` of an attention of a float model."""
    projection: Projection = getattr(site, which)
    layer = model.get_submodule(projection.layer)
    return Operand(layer, projection.rows(layer.out_features), heads_of(model, site))


@torch.no_grad()
def divide_columns(layer: nn.Module, factor: Tensor) -> None:
    """Divides the input channels of a Linear, or of a convolution without groups, by ``factor`` (in,)."""
    shape = (1, -1, *[1] * (layer.weight.dim() - 2))
    layer.weight.div_(factor.to(layer.weight).view(shape))
