"""Meta's SAM 2 checkpoints (``sam2_hiera_large.pt``, ``sam2.1_hiera_tiny.pt``, fine-tunes of them).

They hold the whole model, memory included, and become transformers' ``Sam2VideoModel``; without any tensor of the
memory they become a ``Sam2Model``. Sizes are read from shapes. What no shape shows (heads, windows, which blocks see
the whole image) is known of the four published image encoders (:mod:`carsam.models.sam2.sizes`); others are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Sam2Config, Sam2Model, Sam2VideoConfig, Sam2VideoModel

from carsam.errors import CheckpointError
from carsam.models.files.state import some
from carsam.models.sam.declared import numbered
from carsam.models.sam2.sizes import ARCHITECTURES, PATCH, Architecture
from carsam.models.skeleton import BAD_CONFIG, fill_buffers, skeleton

ANCHOR = "image_encoder.trunk.patch_embed.proj.weight"
# Of every published model; a fine-tune at another size says so.
IMAGE_SIZE = 1024
LARGEST_INPUT = 2048
DECODER_HEADS = 8
# Of a state with memory: a tensor that SAM 2.0 has as well.
MEMORY_ANCHOR = "memory_attention.layers.0.norm1.weight"

# transformers' name → Meta's name, applied in order; feed-forward networks follow in `meta_name`.
RENAMES: tuple[tuple[str, str], ...] = (
    (
        r"^(shared_image_embedding|prompt_encoder\.shared_embedding)\.positional_embedding$",
        "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (r"^vision_encoder\.backbone\.patch_embed\.projection\.", "image_encoder.trunk.patch_embed.proj."),
    (r"^vision_encoder\.backbone\.blocks\.(\d+)\.layer_norm([12])\.", r"image_encoder.trunk.blocks.\1.norm\2."),
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"^vision_encoder\.neck\.convs\.(\d+)\.", r"image_encoder.neck.convs.\1.conv."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "sam_prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "sam_prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "sam_prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "sam_prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "sam_prompt_encoder.mask_downscaling.6."),
    (r"^prompt_encoder\.", "sam_prompt_encoder."),
    (
        r"^mask_decoder\.transformer\.layers\.(\d+)\.layer_norm([1-4])\.",
        r"sam_mask_decoder.transformer.layers.\1.norm\2.",
    ),
    (r"^mask_decoder\.transformer\.layer_norm_final_attn\.", "sam_mask_decoder.transformer.norm_final_attn."),
    (r"^mask_decoder\.(transformer\..+)\.o_proj\.", r"sam_mask_decoder.\1.out_proj."),
    (r"^mask_decoder\.upscale_conv1\.", "sam_mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "sam_mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "sam_mask_decoder.output_upscaling.3."),
    (r"^mask_decoder\.", "sam_mask_decoder."),
    (r"^memory_attention\.layer_norm\.", "memory_attention.norm."),
    (r"^memory_attention\.layers\.(\d+)\.layer_norm([1-3])\.", r"memory_attention.layers.\1.norm\2."),
    (r"^memory_attention\.layers\.(\d+)\.(\w+)\.o_proj\.", r"memory_attention.layers.\1.\2.out_proj."),
    (r"^memory_encoder\.feature_projection\.", "memory_encoder.pix_feat_proj."),
    (r"^memory_encoder\.projection\.", "memory_encoder.out_proj."),
    (r"^memory_encoder\.memory_fuser\.layers\.(\d+)\.scale$", r"memory_encoder.fuser.layers.\1.gamma"),
    (r"^memory_encoder\.memory_fuser\.layers\.(\d+)\.layer_norm\.", r"memory_encoder.fuser.layers.\1.norm."),
    (r"^memory_encoder\.memory_fuser\.layers\.(\d+)\.depthwise_conv\.", r"memory_encoder.fuser.layers.\1.dwconv."),
    (
        r"^memory_encoder\.memory_fuser\.layers\.(\d+)\.pointwise_conv([12])\.",
        r"memory_encoder.fuser.layers.\1.pwconv\2.",
    ),
    (r"^memory_temporal_positional_encoding$", "maskmem_tpos_enc"),
    (r"^no_memory_embedding$", "no_mem_embed"),
    (r"^no_memory_positional_encoding$", "no_mem_pos_enc"),
    (r"^no_object_pointer$", "no_obj_ptr"),
    (r"^occlusion_spatial_embedding_parameter$", "no_obj_embed_spatial"),
    (r"^object_pointer_proj\.", "obj_ptr_proj."),
    (r"^temporal_positional_encoding_projection_layer\.", "obj_ptr_tpos_proj."),
)
# Four points in one table here, one tensor each there.
POINTS, META_POINTS = "prompt_encoder.point_embed.weight", "sam_prompt_encoder.point_embeddings.{}.weight"


def meta_name(name: str, depth: int = 3) -> str:
    """Meta's name of a tensor of ``Sam2VideoModel.state_dict()``, but for :data:`POINTS`.

    Args:
        name: By transformers.
        depth: Layers of the head that predicts the IoU.
    """
    for pattern, replacement in RENAMES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            name = renamed
            break
    layer = re.match(r"^memory_encoder\.mask_downsampler\.layers\.(\d+)\.(conv|layer_norm)\.(\w+)$", name)
    if layer:  # convolution, norm and activation take a number each
        number = 3 * int(layer[1]) + (layer[2] == "layer_norm")
        return f"memory_encoder.mask_downsampler.encoder.{number}.{layer[3]}"
    if name.startswith("memory_encoder.mask_downsampler.final_conv."):
        return name.replace("final_conv", "encoder.12")
    network = re.match(r"^(.+)\.(proj_in|proj_out|layers\.\d+)\.(\w+)$", name)
    if network and re.search(r"(\.mlp|_mlps\.\d+|_head|_ptr_proj)$|^obj_ptr_proj$", network[1]):
        owner, part, leaf = network.groups()
        layers = depth if owner.endswith("iou_prediction_head") else 2 if owner.endswith(".mlp") else 3
        # Meta numbers the layers through; transformers names the first and the last.
        index = {"proj_in": 0, "proj_out": layers - 1}.get(part)
        index = int(part.removeprefix("layers.")) + 1 if index is None else index
        return f"{owner}.layers.{index}.{leaf}"
    return name


def key_map(model: PreTrainedModel) -> dict[str, str]:
    """transformers' name → Meta's name for every tensor but :data:`POINTS`."""
    depth = model.config.mask_decoder_config.iou_head_depth
    return {name: meta_name(name, depth) for name in model.state_dict() if name != POINTS}


def state_dict_to_meta(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a float SAM 2 under Meta's names, as the ``sam2`` package's ``load_state_dict`` takes them."""
    weights = model.state_dict()
    renamed = {meta: weights[name] for name, meta in key_map(model).items()}
    return renamed | {META_POINTS.format(i): row[None] for i, row in enumerate(weights[POINTS])}


class _Shapes:
    """Shapes of a state, with errors that name the tensor."""

    def __init__(self, state: Mapping[str, Tensor], source: str):
        self._state, self._source = state, source

    def __call__(self, name: str, dims: int) -> tuple[int, ...]:
        tensor = self._state.get(name)
        if tensor is None:
            raise CheckpointError(
                f"{self._source} is not a whole SAM 2 checkpoint: {name} is missing. Use the complete file."
            )
        if tensor.ndim != dims:
            raise CheckpointError(
                f"{self._source}: {name} has shape {tuple(tensor.shape)}, not {dims} dimensions as in SAM 2."
            )
        return tuple(tensor.shape)

    def count(self, pattern: str) -> int:
        """How many modules are numbered, up to the first gap."""
        return numbered(self._state, pattern)


def architecture(state: Mapping[str, Tensor], source: str) -> Architecture:
    """The image encoder of a state, one of the published ones.

    Raises:
        CheckpointError: It is none of them.
    """
    shape = _Shapes(state, source)
    width = shape(ANCHOR, 4)[0]
    count = shape.count(r"image_encoder\.trunk\.blocks\.(\d+)\.")
    widths = [shape(f"image_encoder.trunk.blocks.{i}.attn.proj.weight", 2)[0] for i in range(count)]
    blocks = tuple(widths.count(each) for each in dict.fromkeys(widths))
    background = shape("image_encoder.trunk.pos_embed", 4)[2:]
    window = shape("image_encoder.trunk.pos_embed_window", 4)[2]
    for known in ARCHITECTURES.values():
        if (known.width, known.blocks, known.background, known.windows[0]) == (width, blocks, background, window):
            return known
    published = ", ".join(f"{known.width} with {'-'.join(map(str, known.blocks))}" for known in ARCHITECTURES.values())
    raise CheckpointError(
        f"{source} has an image encoder of {width} channels with {'-'.join(map(str, blocks)) or 'no'} blocks, which is "
        f"none of the published ones ({published}), and its tensors do not show heads and windows. Save the model with "
        "transformers (Sam2VideoModel.save_pretrained), and pass that folder."
    )


def infer_config(
    state: Mapping[str, Tensor], source: str = "the checkpoint", image_size: int | None = None
) -> Sam2Config | Sam2VideoConfig:
    """The configuration behind a Meta state dict.

    Args:
        state: Tensors by Meta's names.
        source: What errors call it.
        image_size: Side of the input in pixels; None for the published 1024.

    Raises:
        CheckpointError: A tensor that is needed is missing, the image encoder is not a published one, or the image size
            is none.
    """
    empty = next((name for name, tensor in state.items() if not tensor.numel()), None)
    if empty is not None:
        raise CheckpointError(f"{source} does not fit together: {empty} is empty. The file is damaged.")
    size = IMAGE_SIZE if image_size is None else image_size
    if size % (4 * PATCH) or not 0 < size <= LARGEST_INPUT:
        raise CheckpointError(
            f"a SAM 2 cannot take images of {size} pixels: the side must be a multiple of {4 * PATCH}, at most "
            f"{LARGEST_INPUT}."
        )
    shape = _Shapes(state, source)
    parts = architecture(state, source).parts(size)
    hidden = shape("sam_mask_decoder.iou_token.weight", 2)[1]
    parts["vision_config"]["fpn_hidden_size"] = shape("image_encoder.neck.convs.0.conv.weight", 4)[0]
    parts["prompt_encoder_config"] |= {
        "hidden_size": shape("sam_prompt_encoder.no_mask_embed.weight", 2)[1],
        "mask_input_channels": shape("sam_prompt_encoder.mask_downscaling.3.weight", 4)[0],
        "num_point_embeddings": shape.count(r"sam_prompt_encoder\.point_embeddings\.(\d+)\."),
    }
    cross = shape("sam_mask_decoder.transformer.final_attn_token_to_image.q_proj.weight", 2)[0]
    parts["mask_decoder_config"] = {
        "hidden_size": hidden,
        "mlp_dim": shape("sam_mask_decoder.transformer.layers.0.mlp.layers.0.weight", 2)[0],
        "num_hidden_layers": shape.count(r"sam_mask_decoder\.transformer\.layers\.(\d+)\."),
        "num_attention_heads": DECODER_HEADS,
        "attention_downsample_rate": max(1, hidden // cross),
        "num_multimask_outputs": shape("sam_mask_decoder.mask_tokens.weight", 2)[0] - 1,
        "iou_head_depth": shape.count(r"sam_mask_decoder\.iou_prediction_head\.layers\.(\d+)\."),
        "iou_head_hidden_dim": shape("sam_mask_decoder.iou_prediction_head.layers.0.weight", 2)[0],
    }
    if MEMORY_ANCHOR not in state:
        return Sam2Config(**parts)
    return Sam2VideoConfig(**parts, image_size=size, **_memory(state, shape, size))


def _memory(state: Mapping[str, Tensor], shape: _Shapes, size: int) -> dict[str, Any]:
    """Settings of the memory."""
    grid = size // PATCH
    return {
        "num_maskmem": shape("maskmem_tpos_enc", 4)[0],
        # SAM 2.1 has them, SAM 2.0 has not.
        "enable_occlusion_spatial_embedding": "no_obj_embed_spatial" in state,
        "enable_temporal_pos_encoding_for_object_pointers": "obj_ptr_tpos_proj.weight" in state,
        "memory_attention_hidden_size": shape(MEMORY_ANCHOR, 1)[0],
        "memory_attention_num_layers": shape.count(r"memory_attention\.layers\.(\d+)\."),
        "memory_attention_feed_forward_hidden_size": shape("memory_attention.layers.0.linear1.weight", 2)[0],
        "memory_attention_rope_feat_sizes": [grid, grid],
        "memory_encoder_hidden_size": shape("memory_encoder.pix_feat_proj.weight", 4)[0],
        "memory_encoder_output_channels": shape("memory_encoder.out_proj.weight", 4)[0],
        "mask_downsampler_embed_dim": shape("memory_encoder.mask_downsampler.encoder.12.weight", 4)[0],
        "memory_fuser_num_layers": shape.count(r"memory_encoder\.fuser\.layers\.(\d+)\."),
        "memory_fuser_embed_dim": shape("memory_encoder.fuser.layers.0.gamma", 1)[0],
        "memory_fuser_intermediate_dim": shape("memory_encoder.fuser.layers.0.pwconv1.weight", 2)[0],
    }


def sam2_from_meta(
    state: Mapping[str, Tensor], source: str = "the checkpoint", image_size: int | None = None
) -> PreTrainedModel:
    """A SAM 2 with the weights of a Meta state dict.

    Args:
        state: Tensors by Meta's names, in any floating dtype.
        source: What errors call it.
        image_size: Side of the input in pixels; None for the published 1024.

    Returns:
        A ``Sam2VideoModel``, or a ``Sam2Model`` where there is no memory; in float32 on the CPU, its tensors its own.

    Raises:
        CheckpointError: Tensors are missing, left over or of the wrong shape; see :func:`infer_config`.
    """
    config = infer_config(state, source, image_size)
    model_class = Sam2VideoModel if isinstance(config, Sam2VideoConfig) else Sam2Model
    try:
        model = skeleton(model_class, config)
    except BAD_CONFIG as error:
        raise CheckpointError(f"{source} has shapes that make no SAM 2: {error}") from error
    names, expected = key_map(model), model.state_dict()
    points = [META_POINTS.format(index) for index in range(expected[POINTS].shape[0])]
    missing = sorted({*names.values(), *points} - set(state))
    if missing:
        raise CheckpointError(
            f"{source} is not a whole SAM 2 checkpoint: {some(missing)} missing. Use the complete file."
        )
    unexpected = sorted(set(state) - {*names.values(), *points})
    if unexpected:
        raise CheckpointError(
            f"{source} has tensors that SAM 2 does not: {some(unexpected)}. Variants of SAM 2 are not supported; if "
            "these tensors play no part, save the file without them."
        )
    wanted = {meta: tuple(expected[name].shape) for name, meta in names.items()}
    wanted |= dict.fromkeys(points, (1, expected[POINTS].shape[1]))
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in wanted.items()
        if tuple(state[name].shape) != shape
    ]
    wrong += [f"{name} in {state[name].dtype}" for name in wanted if not state[name].is_floating_point()]
    if wrong:
        raise CheckpointError(f"{source} does not fit together: {some(wrong)}. The file is damaged or not a SAM 2.")
    # copy=True: a float32 tensor would otherwise stay mapped from the file, which may change or vanish.
    weights = {name: state[meta].to(torch.float32, copy=True) for name, meta in names.items()}
    weights[POINTS] = torch.cat([state[name].float() for name in points])
    model.load_state_dict(weights, strict=True, assign=True)
    fill_buffers(model)
    return model
