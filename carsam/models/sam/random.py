"""SAMs with random weights, for benchmarks and tests that need real sizes but no download.

transformers' own initialisation is of no use here: it draws the image encoder at std 1e-10 (every activation then
vanishes) and the Fourier features of the prompts at std hidden_size / 2 (neighbouring points become unrelated).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import SamConfig, SamModel

from carsam.errors import ConfigError
from carsam.models.skeleton import skeleton

# hidden_size, num_hidden_layers, num_attention_heads, window_size, global_attn_indexes; everything else is shared.
SIZES: dict[str, tuple[int, int, int, int, list[int]]] = {
    "nano": (192, 8, 3, 7, [1, 3, 5, 7]),
    "vit-b": (768, 12, 12, 14, [2, 5, 8, 11]),
    "vit-l": (1024, 24, 16, 14, [5, 11, 17, 23]),
    "vit-h": (1280, 32, 16, 14, [7, 15, 23, 31]),
}
PATCH = 16


def sam_config(size: str, image_size: int = 1024, blocks: int | None = None) -> SamConfig:
    """The configuration of one of the published sizes, or of the embedded nano model.

    Args:
        size: A key of ``SIZES``.
        image_size: Side of the square input, in pixels; a multiple of 16.
        blocks: Only so many blocks of the image encoder, the first ones.

    Raises:
        ConfigError: Unknown size, or an image size that 16 does not divide.
    """
    if size not in SIZES:
        raise ConfigError(f"unknown SAM size {size!r}; choose one of {', '.join(SIZES)}.")
    if image_size < PATCH or image_size % PATCH:
        raise ConfigError(f"image_size is {image_size}; it must be a positive multiple of {PATCH}.")
    width, depth, heads, window, global_blocks = SIZES[size]
    depth = min(depth, blocks or depth)
    vision = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "mlp_dim": 4 * width,
        "window_size": window,
        "global_attn_indexes": [index for index in global_blocks if index < depth],
        "image_size": image_size,
        "patch_size": PATCH,
    }
    return SamConfig(vision_config=vision, prompt_encoder_config={"image_size": image_size, "patch_size": PATCH})


def random_sam(size: str, image_size: int = 1024, seed: int = 0, blocks: int | None = None) -> SamModel:
    """A SAM with random weights, the same for the same arguments; the global random state is left as it was.

    Every layer is drawn as PyTorch's ``reset_parameters`` does; position embeddings as ViT does (std 0.02);
    Fourier features as the original code does (one matrix at std 1, shared by image and prompts).

    Args:
        size: "vit-b", "vit-l", "vit-h" or "nano".
        image_size: Side of the square input, in pixels; a multiple of 16.
        seed: Seed of the weights.
        blocks: Only so many blocks of the image encoder, the first ones.

    Returns:
        The model in float32 on the CPU, in evaluation mode, its parameters frozen.

    Raises:
        ConfigError: Unknown size, or an image size that 16 does not divide.
    """
    model = skeleton(SamModel, sam_config(size, image_size, blocks)).to_empty(device="cpu")
    model.tie_weights()  # to_empty gives each module a tensor of its own
    # Only the CPU generator is touched: torch.manual_seed would also reseed every GPU.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for name, parameter in model.named_parameters():
            if name.endswith(("pos_embed", "rel_pos_h", "rel_pos_w")):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("positional_embedding"):
                parameter.normal_()
    return model.eval().requires_grad_(False)
