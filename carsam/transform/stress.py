"""The stressed twin (METHOD.md, 9): a model that computes the same in floating point and is harder to quantize.

Small subjects are milder than SAM-B. The twin carries what papers report of it: bimodal keys, outlier channels in
queries and values, outlier channels after the encoder's norms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import SamModel

from carsam.errors import ConfigError
from carsam.models.sites import find_sites

# One channel in so many of a query head's is an outlier.
OUTLIER_EVERY = 16


@torch.no_grad()
def stress(model: SamModel, strength: float, seed: int = 0) -> SamModel:
    """Changes a float model in place to its twin; its outputs stay what they were, up to rounding.

    - Keys: biases ± 8t per channel in the decoder, ± 4t in the encoder. Softmax ignores what is added to all keys.
    - Queries: one channel in sixteen times up to 1 + 4t, the key's divided (and the encoder's relative positions,
      which meet the query as further keys).
    - Values: channels times up to 1 + 3t, the output projection's columns divided.
    - Encoder norms: weight and bias times up to 1 + 8t per channel, columns of the next Linear divided. A pure scale
      leaves the zeros that pad windows as they are.

    Args:
        model: A float SAM.
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

    for site in find_sites(model).attentions:
        attention = model.get_submodule(site.name)
        if site.fused:
            qkv, heads = attention.qkv, attention.num_attention_heads
            width = qkv.out_features // 3
            query, key, value = (slice(i * width, (i + 1) * width) for i in range(3))
            # Relative positions are shared by the heads, so the outlier channels are the same in each.
            scale = outliers(width // heads)
            if attention.use_rel_pos:
                attention.rel_pos_h.div_(scale)
                attention.rel_pos_w.div_(scale)
            scale = scale.repeat(heads)
            qkv.bias[key] += 4 * strength * signs(width)
            _scale_rows(qkv, query, scale)
            _scale_rows(qkv, key, 1 / scale)
            scale = factors(width, 1 + 3 * strength)
            _scale_rows(qkv, value, scale)
            attention.proj.weight.div_(scale)
        else:
            width, everything = attention.k_proj.out_features, slice(None)
            attention.k_proj.bias += 8 * strength * signs(width)
            scale = outliers(width)
            _scale_rows(attention.q_proj, everything, scale)
            _scale_rows(attention.k_proj, everything, 1 / scale)
            scale = factors(width, 1 + 3 * strength)
            _scale_rows(attention.v_proj, everything, scale)
            attention.out_proj.weight.div_(scale)

    for layer in model.vision_encoder.layers:
        for norm, reader in ((layer.layer_norm1, layer.attn.qkv), (layer.layer_norm2, layer.mlp.lin1)):
            scale = factors(norm.weight.numel(), 1 + 8 * strength)
            norm.weight.mul_(scale)
            norm.bias.mul_(scale)
            reader.weight.div_(scale)
    return model


def _scale_rows(layer: nn.Linear, rows: slice, scale: Tensor) -> None:
    layer.weight[rows] *= scale[:, None]
    layer.bias[rows] *= scale
