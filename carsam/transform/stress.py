"""The stressed twin (METHOD.md, 9): a model that computes the same in floating point and is harder to quantize.

Small subjects are milder than SAM-B. The twin carries what papers report of it: bimodal keys, outlier channels in
queries and values, outlier channels after the encoder's norms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carsam.errors import ConfigError
from carsam.models.family import find_sites
from carsam.models.sites import Projection

# One channel in so many of a query head's is an outlier.
OUTLIER_EVERY = 16


@torch.no_grad()
def stress(model: nn.Module, strength: float, seed: int = 0) -> nn.Module:
    """Changes a float model in place to its twin; its outputs stay what they were, up to rounding.

    - Keys: biases ± 8t per channel in the decoder, ± 4t in the encoder. Softmax ignores what is added to all keys.
    - Queries: one channel in sixteen times up to 1 + 4t, the key's divided (and the encoder's relative positions,
      which meet the query as further keys).
    - Values: channels times up to 1 + 3t, the output projection's columns divided.
    - Encoder norms: weight and bias times up to 1 + 8t per channel, columns of the next Linear divided. A pure scale
      leaves the zeros that pad windows as they are.

    Args:
        model: A float model.
        strength: t ≥ 0; 0 changes nothing.
        seed: Of signs and factors.

    Returns:
        ``model``.

    Raises:
        ConfigError: The strength is negative.
    """
    if strength < 0:
        raise ConfigError(f"the strength of the stress must not be negative, it is {strength}.")
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int, most: float) -> Tensor:
        return 1 + (most - 1) * torch.rand(count, generator=generator)

    def signs(count: int) -> Tensor:
        return torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1

    def outliers(count: int) -> Tensor:
        scale = torch.ones(count)
        chosen = torch.randperm(count, generator=generator)[: max(1, count // OUTLIER_EVERY)]
        scale[chosen] = factors(len(chosen), 1 + 4 * strength)
        return scale

    sites = find_sites(model)
    for site in sites.attentions:
        attention = model.get_submodule(site.name)
        query, key, value = (_rows(model, part) for part in (site.query, site.key, site.value))
        output = model.get_submodule(site.output)
        width = len(key)
        if site.coupled:
            key.shift(8 * strength * signs(width))
            scale = outliers(width)
        else:
            # Relative positions are shared by the heads, so the outlier channels are the same in each.
            heads = attention.num_attention_heads
            scale = outliers(width // heads)
            for name in site.positions:
                getattr(attention, name).div_(scale)
            scale = scale.repeat(heads)
            key.shift(4 * strength * signs(width))
        query.scale(scale)
        key.scale(1 / scale)
        scale = factors(width, 1 + 3 * strength)
        value.scale(scale)
        output.weight.div_(scale)

    for norm, reader in ((model.get_submodule(n), model.get_submodule(r)) for n, r in sites.readers):
        scale = factors(norm.weight.numel(), 1 + 8 * strength)
        norm.weight.mul_(scale)
        norm.bias.mul_(scale)
        reader.weight.div_(scale)
    return model


@dataclass(frozen=True)
class _Rows:
    """The output channels of a layer that project one operand."""

    layer: nn.Linear
    rows: slice

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start

    def shift(self, offset: Tensor) -> None:
        self.layer.bias[self.rows] += offset

    def scale(self, factor: Tensor) -> None:
        self.layer.weight[self.rows] *= factor[:, None]
        self.layer.bias[self.rows] *= factor


def _rows(model: nn.Module, projection: Projection) -> _Rows:
    layer = model.get_submodule(projection.layer)
    return _Rows(layer, projection.rows(layer.out_features))
