"""Meta's own SAM checkpoints (``sam_vit_b_01ec64.pth`` and fine-tunes of it) as transformers' ``SamModel``.

The architecture is read from the tensors' shapes, so a fine-tune at another image size or width needs no settings.
Names are mapped one to one in both directions; a tensor that is missing or left over is an error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import SamConfig, SamModel

from carsam.data.images.normalisation import BUFFERS, from_buffers, set_normalisation
from carsam.errors import CheckpointError
from carsam.models.files.state import some
from carsam.models.files.torch import mappings
from carsam.models.sam.declared import numbered
from carsam.models.skeleton import BAD_CONFIG, skeleton

logger = logging.getLogger(__name__)

# Meta's TwoWayAttentionBlock takes torch's default eps of nn.LayerNorm; transformers' published configurations say
# 1e-6 there. Meta's value is right for Meta's files. All other norms have the same eps in both (final decoder norm
# 1e-5; encoder blocks, neck, mask prompt and upscaling 1e-6). tests/models/test_meta_parity.py compares all of them.
TWO_WAY_EPS = 1e-5
VISION_EPS = 1e-6

ANCHOR = "image_encoder.patch_embed.proj.weight"
# Where SAM's decoder has heads, tensors do not show them: every published model has eight.
DECODER_HEADS = 8

# transformers' name → Meta's name, applied in order. Feed-forward heads follow in `_meta_name`.
RENAMES: tuple[tuple[str, str], ...] = (
    (
        r"^(shared_image_embedding|prompt_encoder\.shared_embedding)\.positional_embedding$",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (r"^vision_encoder\.layers\.(\d+)\.layer_norm([12])\.", r"image_encoder.blocks.\1.norm\2."),
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^mask_decoder\.transformer\.layers\.(\d+)\.layer_norm([1-4])\.", r"mask_decoder.transformer.layers.\1.norm\2."),
    (r"^mask_decoder\.transformer\.layer_norm_final_attn\.", "mask_decoder.transformer.norm_final_attn."),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
)


def meta_name(name: str, iou_head_depth: int) -> str:
    """Meta's name of a tensor of ``SamModel.state_dict()``."""
    head = re.match(r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.(.+)\.(\w+)$", name)
    if head:
        # Meta numbers the layers of a head through; transformers names the first and the last.
        owner, part, leaf = head.groups()
        depth = iou_head_depth if owner.endswith("iou_prediction_head") else 3
        index = {"proj_in": 0, "proj_out": depth - 1}.get(part)
        index = int(part.removeprefix("layers.")) + 1 if index is None else index
        return f"{owner}.layers.{index}.{leaf}"
    for pattern, replacement in RENAMES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def key_map(model: SamModel) -> dict[str, str]:
    """transformers' name → Meta's name for every tensor; the two tied Fourier matrices share one of Meta's names."""
    depth = model.config.mask_decoder_config.iou_head_depth
    return {name: meta_name(name, depth) for name in model.state_dict()}


def state_dict_to_meta(model: SamModel) -> dict[str, Tensor]:
    """The weights of a float SAM under Meta's names, as ``segment_anything``'s ``load_state_dict`` takes them.

    The eps of the decoder's norms is not part of a state dict: whoever loads the result uses Meta's 1e-5.

    Args:
        model: A float ``SamModel``.

    Returns:
        Tensors that share memory with the model's.
    """
    weights = model.state_dict()
    return {meta: weights[name] for name, meta in key_map(model).items()}


def why_not_sam(content: object) -> str:
    """What a checkpoint without SAM's image encoder is, and what to do; never at the cost of the user's own weights."""
    keys = [str(key) for mapping in mappings(content) for key in mapping]
    if any("image_encoder.trunk." in key or "memory_attention." in key or "obj_ptr_" in key for key in keys):
        return (
            "it is a part of a SAM 2 checkpoint: there is no image_encoder.trunk.patch_embed. Use the whole file, such "
            "as sam2.1_hiera_tiny.pt."
        )
    if any("vision_encoder.layers." in key for key in keys):
        return (
            "its tensors have transformers' names; put it as pytorch_model.bin beside the config.json of the model "
            "that it was trained from, and pass the folder with config.json."
        )
    if any(re.search(r"lora_|(^|\.)(w_[ab]_\d+|linear_[ab]_[qv])|adapter", key, re.IGNORECASE) for key in keys):
        return (
            "it holds an adapter (LoRA or the like) and not the weights that it adapts; merge it into its model where "
            "it was trained, and save the whole model: torch.save(model.state_dict(), path)."
        )
    if any("image_encoder." in key for key in keys):
        return (
            f"there is no {ANCHOR}, so its image encoder is not SAM's ViT (carsam reads SAM's ViT, and the TinyViT of "
            "MobileSAM and LiteMedSAM)."
        )
    if any(re.search(r"(^|\.)(mask_decoder|output_upscaling|iou_prediction_head)\.", key) for key in keys):
        return (
            "it holds a mask decoder without an image encoder. Put it into the checkpoint that it was trained with and "
            "pass the result: whole = torch.load(base); whole.update(decoder); torch.save(whole, path), with names "
            "such as mask_decoder.iou_token.weight."
        )
    held = f"it holds {some(keys)}" if keys else f"it holds a {type(content).__name__}"
    return f"there is no {ANCHOR}; {held}. carsam reads SAM in Meta's form (as sam_vit_b_01ec64.pth) or transformers'."


def infer_config(state: Mapping[str, Tensor], source: str = "the checkpoint") -> SamConfig:
    """The architecture behind a Meta state dict, from its shapes.

    Args:
        state: Tensors by Meta's names.
        source: What errors call it.

    Raises:
        CheckpointError: A tensor that is needed is missing, or the shapes do not fit together.
    """

    def shape(name: str, dims: int) -> tuple[int, ...]:
        return tensor_shape(state, source, name, dims)

    def count(pattern: str) -> int:
        # Up to the first gap: a lone layer 3000000 must not make three million.
        return numbered(state, pattern)

    empty = next((name for name, tensor in state.items() if not tensor.numel()), None)
    if empty is not None:
        raise CheckpointError(f"{source} does not fit together: {empty} is empty. The file is damaged.")

    width, channels, patch, _ = shape(ANCHOR, 4)
    _, grid, grid_w, _ = shape("image_encoder.pos_embed", 4)
    if grid != grid_w:
        raise CheckpointError(f"{source} was made for {grid_w}×{grid} patches; carsam supports square inputs only.")

    depth = count(r"image_encoder\.blocks\.(\d+)\.")
    rel_pos = [shape(f"image_encoder.blocks.{i}.attn.rel_pos_h", 2) for i in range(depth)]
    if not rel_pos:
        raise CheckpointError(f"{source} is not a whole SAM checkpoint: it has no image_encoder.blocks.")
    # A table of relative positions has 2 n - 1 rows: n is the grid in a global block, the window in the others.
    reach = [(rows + 1) // 2 for rows, _ in rel_pos]
    windows = sorted({n for n in reach if n != grid})
    if len(windows) > 1:
        raise CheckpointError(
            f"{source}: relative positions span {windows} patches beside the {grid} of pos_embed; expected one window "
            "size. If pos_embed was resized to another image size, resize rel_pos of the global blocks as well."
        )
    head_dim = rel_pos[0][1]
    if not head_dim or width % head_dim:
        raise CheckpointError(f"{source}: heads of {head_dim} channels do not divide the width {width}.")

    others = prompt_and_decoder(state, source, grid * patch, patch)
    vision = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // head_dim,
        "num_channels": channels,
        "image_size": grid * patch,
        "patch_size": patch,
        "mlp_dim": shape("image_encoder.blocks.0.mlp.lin1.weight", 2)[0],
        "qkv_bias": "image_encoder.blocks.0.attn.qkv.bias" in state,
        "window_size": windows[0] if windows else grid,
        "global_attn_indexes": [i for i, n in enumerate(reach) if n == grid],
        "output_channels": shape("image_encoder.neck.0.weight", 4)[0],
        "num_pos_feats": shape("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", 2)[1],
        "layer_norm_eps": VISION_EPS,
    }
    return SamConfig(vision_config=vision, **others)


def tensor_shape(state: Mapping[str, Tensor], source: str, name: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor, checked to be there and to have as many dimensions.

    Raises:
        CheckpointError: It is not, or has not.
    """
    tensor = state.get(name)
    if tensor is None:
        raise CheckpointError(f"{source} is not a whole SAM checkpoint: {name} is missing. Use the complete file.")
    if not tensor.numel():
        raise CheckpointError(f"{source} does not fit together: {name} is empty. The file is damaged.")
    if tensor.ndim != dims:
        raise CheckpointError(f"{source}: {name} has shape {tuple(tensor.shape)}, not {dims} dimensions as in SAM.")
    return tuple(tensor.shape)


def prompt_and_decoder(
    state: Mapping[str, Tensor], source: str, image_size: int, patch_size: int
) -> dict[str, dict[str, Any]]:
    """Settings of prompt encoder and mask decoder behind a state dict by Meta's names, from its shapes.

    Args:
        state: Tensors by Meta's names.
        source: What errors call it.
        image_size: Side of the input, in pixels.
        patch_size: Pixels of the input per cell of the image embedding.

    Returns:
        ``prompt_encoder_config`` and ``mask_decoder_config`` of a ``SamConfig``.

    Raises:
        CheckpointError: A tensor that is needed is missing, or the shapes do not fit together.
    """

    def shape(name: str, dims: int) -> tuple[int, ...]:
        return tensor_shape(state, source, name, dims)

    def count(pattern: str) -> int:
        return numbered(state, pattern)

    hidden = shape("mask_decoder.iou_token.weight", 2)[1]
    cross = shape("mask_decoder.transformer.final_attn_token_to_image.q_proj.weight", 2)[0]
    prompt = {
        "hidden_size": shape("prompt_encoder.no_mask_embed.weight", 2)[1],
        "image_size": image_size,
        "patch_size": patch_size,
        "mask_input_channels": shape("prompt_encoder.mask_downscaling.3.weight", 4)[0],
        "num_point_embeddings": count(r"prompt_encoder\.point_embeddings\.(\d+)\."),
    }
    tokens = shape("mask_decoder.mask_tokens.weight", 2)[0]
    networks = count(r"mask_decoder\.output_hypernetworks_mlps\.(\d+)\.")
    if networks != tokens or tokens < 2:
        raise CheckpointError(
            f"{source} does not fit together: {tokens} mask tokens with {networks} mask heads "
            "(output_hypernetworks_mlps). The file is damaged or incomplete."
        )
    decoder = {
        "hidden_size": hidden,
        "mlp_dim": shape("mask_decoder.transformer.layers.0.mlp.lin1.weight", 2)[0],
        "num_hidden_layers": count(r"mask_decoder\.transformer\.layers\.(\d+)\."),
        "num_attention_heads": DECODER_HEADS,
        "attention_downsample_rate": max(1, hidden // max(1, cross)),
        "num_multimask_outputs": tokens - 1,
        "iou_head_depth": count(r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\."),
        "iou_head_hidden_dim": shape("mask_decoder.iou_prediction_head.layers.0.weight", 2)[0],
        "layer_norm_eps": TWO_WAY_EPS,
    }
    return {"prompt_encoder_config": prompt, "mask_decoder_config": decoder}


def sam_from_meta(state: Mapping[str, Tensor], source: str = "the checkpoint") -> SamModel:
    """A ``SamModel`` with the weights of a Meta state dict.

    Args:
        state: Tensors by Meta's names, in any floating dtype.
        source: What errors call it.

    Returns:
        The model in float32 on the CPU, with memory of its own and the normalisation of its ``pixel_mean`` and
        ``pixel_std``.

    Raises:
        CheckpointError: Tensors are missing, left over or of the wrong shape.
    """
    config = infer_config(state, source)
    try:
        model = skeleton(SamModel, config)
    except BAD_CONFIG as error:
        raise CheckpointError(f"{source} has shapes that make no SAM: {error}") from error
    expected = model.state_dict()
    names = key_map(model)
    missing = sorted(set(names.values()) - set(state))
    if missing:
        raise CheckpointError(
            f"{source} is not a whole SAM checkpoint: {some(missing)} missing. Use the complete file."
        )
    unexpected = sorted(set(state) - set(names.values()) - set(BUFFERS))
    if unexpected:
        raise CheckpointError(
            f"{source} has tensors that SAM does not: {some(unexpected)}. {variant(unexpected)} if these tensors play "
            "no part, save the file without them."
        )
    wrong = [
        f"{meta} {tuple(state[meta].shape)} instead of {tuple(expected[name].shape)}"
        for name, meta in names.items()
        if state[meta].shape != expected[name].shape
    ]
    wrong += [
        f"{meta} in {tensor.dtype}"
        for meta, tensor in state.items()
        if not tensor.is_floating_point() and meta not in BUFFERS
    ]
    if wrong:
        raise CheckpointError(f"{source} does not fit together: {some(wrong)}. The file is damaged or not a SAM.")

    # copy=True: a float32 tensor would otherwise stay mapped from the file, which may change or vanish.
    weights = {name: state[meta].to(torch.float32, copy=True) for name, meta in names.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    set_normalisation(model, from_buffers(*(state.get(name) for name in BUFFERS), source))
    return model


def variant(names: list[str]) -> str:
    """What tensors beyond SAM's tell of."""
    if any("hf_token" in name or "hf_mlp" in name or "compress_vit_feat" in name for name in names):
        return "It is SAM-HQ, whose extra decoder is not supported;"
    if any(re.search(r"lora_|adapter|prompt_generator", name, re.IGNORECASE) for name in names):
        return "It has adapters, which are not supported: merge them into the weights where it was trained, or"
    return "Variants of SAM (SAM-HQ, adapters) are not supported;"
