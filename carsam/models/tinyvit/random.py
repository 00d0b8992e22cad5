"""MobileSAM and LiteMedSAM with random weights, for benchmarks and tests that need real sizes but no download."""

from __future__ import annotations

import math

import torch
from torch import nn

from carsam.data.images.normalisation import set_normalisation
from carsam.errors import ConfigError
from carsam.models.skeleton import BAD_CONFIG, skeleton
from carsam.models.tinyvit.configuration import TinyVitConfig, TinyVitSamConfig
from carsam.models.tinyvit.meta import PUBLISHED
from carsam.models.tinyvit.modeling import TinyVitAttention, TinyVitSamModel

# The kernel of the patch embedding is all in which the two published architectures differ, but for the image size.
KINDS: dict[str, int] = {"mobilesam": 3, "litemedsam": 1}
# torch's default, as segment-anything's decoder has it; transformers' is 1e-6.
DECODER_EPS = 1e-5


def tinyvit_config(kind: str, image_size: int | None = None, **vision: object) -> TinyVitSamConfig:
    """The configuration of a published model.

    Args:
        kind: "mobilesam" or "litemedsam".
        image_size: Side of the square input, in pixels; None for the published one (1024 or 256).
        **vision: Settings of :class:`TinyVitConfig` that are to differ, such as ``embed_dims``.

    Raises:
        ConfigError: Unknown kind, or settings that make no encoder.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown TinyViT SAM {kind!r}; choose one of {', '.join(KINDS)}.")
    kernel = KINDS[kind]
    size = PUBLISHED[kernel][0] if image_size is None else image_size
    try:
        config = TinyVitConfig(patch_kernel=kernel, image_size=size, **vision)
        return TinyVitSamConfig(vision_config=config, mask_decoder_config={"layer_norm_eps": DECODER_EPS})
    except BAD_CONFIG as error:
        raise ConfigError(f"{kind}: {error}") from error


def random_tinyvit(
    kind: str = "mobilesam", image_size: int | None = None, seed: int = 0, **vision: object
) -> TinyVitSamModel:
    """A model with random weights, the same for the same arguments; the global random state is left as it was.

    Linears and the decoder are drawn as PyTorch's ``reset_parameters`` does. The encoder's convolutions are drawn so
    that they keep the scale of their inputs, as trained ones with folded batch norms do: PyTorch's own draw would let
    the signal fade by a factor of 0.6 at each of the twenty that no shortcut passes.

    Args:
        kind: "mobilesam" or "litemedsam".
        image_size: Side of the square input, in pixels; None for the published one (1024 or 256).
        seed: Seed of the weights.
        **vision: Settings of :class:`TinyVitConfig` that are to differ, such as ``embed_dims``.

    Returns:
        The model in float32 on the CPU, in evaluation mode, its parameters frozen, with the published normalisation.

    Raises:
        ConfigError: Unknown kind, or settings that make no encoder.
    """
    config = tinyvit_config(kind, image_size, **vision)
    model = skeleton(TinyVitSamModel, config).to_empty(device="cpu")
    model.tie_weights()  # to_empty gives each module a tensor of its own
    # Only the CPU generator is touched: torch.manual_seed would also reseed every GPU.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for module in model.vision_encoder.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(std=1 / math.sqrt(module.weight[0].numel()))
            elif isinstance(module, TinyVitAttention):
                nn.init.trunc_normal_(module.attention_biases, std=0.5)
        model.shared_image_embedding.positional_embedding.normal_()
    set_normalisation(model, PUBLISHED[KINDS[kind]][1])
    return model.eval().requires_grad_(False)
