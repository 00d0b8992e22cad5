"""SAM 2s with random weights, for benchmarks and tests that need real sizes but no download.

transformers leaves position embeddings and the memory's own embeddings at zero, where nothing would show an error in
them; here they are drawn.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel, Sam2Config, Sam2Model, Sam2VideoConfig, Sam2VideoModel

from carsam.errors import ConfigError
from carsam.models.sam2.sizes import ARCHITECTURES, PATCH, Architecture
from carsam.models.skeleton import fill_buffers, skeleton

# The smallest that has all that the others have: windows of each width, padding, global attention, pooling.
SIZES: dict[str, Architecture] = {
    **ARCHITECTURES,
    "nano": Architecture(16, (1, 1, 2, 1), (1, 2, 2, 4), (8, 4, 6, 4), (3,), (7, 7), (16, 32, 48, 64), 256),
}


def random_sam2(
    size: str = "nano",
    image_size: int = 1024,
    seed: int = 0,
    *,
    video: bool = False,
    version: str = "2.1",
    memory: dict[str, int] | None = None,
) -> PreTrainedModel:
    """A SAM 2 with random weights, the same for the same arguments; the global random state is left as it was.

    Every layer is drawn as PyTorch's ``reset_parameters`` does; position embeddings and the embeddings of what is not
    there at std 0.02; Fourier features as the original code does.

    Args:
        size: "tiny", "small", "base-plus", "large" or "nano".
        image_size: Side of the square input, in pixels; a multiple of 64.
        seed: Seed of the weights.
        video: With the memory: a ``Sam2VideoModel``.
        version: "2.0" or "2.1", of the memory.
        memory: Settings of ``Sam2VideoConfig`` that are to differ, such as ``memory_attention_num_layers``.

    Returns:
        The model in float32 on the CPU, in evaluation mode, its parameters frozen.

    Raises:
        ConfigError: Unknown size or version, or an image size that 64 does not divide.
    """
    config = sam2_config(size, image_size, video=video, version=version, **(memory or {}))
    model = skeleton(Sam2VideoModel if video else Sam2Model, config).to_empty(device="cpu")
    # Only the CPU generator is touched: torch.manual_seed would also reseed every GPU.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            for name, parameter in module.named_parameters(recurse=False):
                if hasattr(module, "reset_parameters"):
                    break
                if name == "scale":  # of the memory fuser's blocks
                    parameter.fill_(0.5)
                else:
                    nn.init.trunc_normal_(parameter, std=0.02)
        features = torch.randn_like(model.shared_image_embedding.positional_embedding)
        for place in (model.shared_image_embedding, model.prompt_encoder.shared_embedding):
            place.positional_embedding.copy_(features)
    fill_buffers(model)
    return model.eval().requires_grad_(False)


def sam2_config(
    size: str, image_size: int = 1024, *, video: bool = False, version: str = "2.1", **memory: int
) -> Sam2Config | Sam2VideoConfig:
    """The configuration of one of the published sizes, or of "nano".

    Args:
        size: A key of ``SIZES``.
        image_size: Side of the square input, in pixels; a multiple of 64.
        video: With the memory.
        version: "2.0" or "2.1", of the memory.
        **memory: Settings of ``Sam2VideoConfig`` that are to differ.

    Raises:
        ConfigError: Unknown size or version, or an image size that 64 does not divide.
    """
    if size not in SIZES:
        raise ConfigError(f"unknown SAM 2 size {size!r}; choose one of {', '.join(SIZES)}.")
    if version not in ("2.0", "2.1"):
        raise ConfigError(f"there is SAM 2.0 and SAM 2.1, not {version!r}.")
    if image_size < 4 * PATCH or image_size % (4 * PATCH):
        raise ConfigError(f"image_size is {image_size}; it must be a positive multiple of {4 * PATCH}.")
    parts = SIZES[size].parts(image_size)
    if not video:
        return Sam2Config(**parts)
    newer = version == "2.1"
    grid = image_size // PATCH
    return Sam2VideoConfig(
        **parts,
        image_size=image_size,
        enable_occlusion_spatial_embedding=newer,
        enable_temporal_pos_encoding_for_object_pointers=newer,
        memory_attention_rope_feat_sizes=[grid, grid],
        **memory,
    )
