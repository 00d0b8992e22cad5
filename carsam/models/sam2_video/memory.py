"""A SAM 2's memory: what is quantized in memory attention and memory encoder, their stages and their units.

A frame reads the memory through memory attention: layers of self-attention, cross-attention to the memories, and an
MLP, with queries and keys rotated by position (RoPE) between projection and MatMul, where they are quantized. Its mask
then goes through the memory encoder into the memory.

A layer of memory attention is one unit, whatever the granularity: it holds a self-attention, a cross-attention and the
MLP between them and the next layer, as JCAR's pairs do in the decoder. The memory encoder is one unit.

What stays in floating point: the projection at the end of the memory encoder, which writes the memory that every later
frame reads (AHCQ-SAM leaves it too); the object pointers' MLP, the projection of their time, and the convolution that
brings a mask prompt to the decoder. ``benchmarks/video_parts.py`` measures what each costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from carsam.calibrate.capture import capture_call
from carsam.models.family import Part, Stage, Tensors
from carsam.models.rotation import Rotation
from carsam.models.sam2_video.clips import OBJECTS, calls_of
from carsam.models.sites import DEPTHWISE, MLP_IN, MLP_OUT, PROJECTION, AttentionSite, LayerSite, Projection
from carsam.reconstruct.units import Unit

if TYPE_CHECKING:
    from carsam.prompts.calibration import CalibrationImage

ATTENTION, ENCODER = "memory_attention", "memory_encoder"
MEMORY = "memory"
# The projections of an attention, by the names in transformers' module.
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# Frames and objects of a clip that calibrate the memory encoder.
_ENCODED = 8
_READ = ("queries", "keys", "key_point_embedding", "pointers")


def layers(model: nn.Module) -> tuple[str, ...]:
    """Module paths of memory attention's layers."""
    return tuple(f"{ATTENTION}.layers.{index}" for index in range(len(model.get_submodule(ATTENTION).layers)))


def stage_paths(model: nn.Module) -> tuple[str, ...]:
    """Module paths of the memory's stages, in the order in which they are quantized."""
    return (ENCODER, *layers(model))


def attentions(model: nn.Module) -> list[AttentionSite]:
    """Self-attention and cross-attention of every layer."""
    found = []
    for layer in layers(model):
        for name in (f"{layer}.self_attn", f"{layer}.cross_attn_image"):
            projections = (Projection(f"{name}.{part}") for part in _PROJECTIONS)
            found.append(AttentionSite(name, *projections, output=f"{name}.o_proj", coupled=True, rotary=True))
    return found


def linear_layers(model: nn.Module) -> list[LayerSite]:
    """Convolutions and Linears of the memory encoder, then the Linears of memory attention."""
    encoder = model.get_submodule(ENCODER)
    found = [LayerSite(f"{ENCODER}.mask_downsampler.layers.{index}.conv") for index in _count(encoder.mask_downsampler)]
    found += [LayerSite(f"{ENCODER}.mask_downsampler.final_conv"), LayerSite(f"{ENCODER}.feature_projection")]
    for index in _count(encoder.memory_fuser):
        block = f"{ENCODER}.memory_fuser.layers.{index}"
        found.append(LayerSite(f"{block}.depthwise_conv", DEPTHWISE))
        found += [LayerSite(f"{block}.pointwise_conv1", MLP_IN), LayerSite(f"{block}.pointwise_conv2", MLP_OUT)]
    for layer in layers(model):
        for name in (f"{layer}.self_attn", f"{layer}.cross_attn_image"):
            found += [LayerSite(f"{name}.{part}", PROJECTION) for part in _PROJECTIONS]
            found.append(LayerSite(f"{name}.o_proj"))
        found += [LayerSite(f"{layer}.linear1", MLP_IN), LayerSite(f"{layer}.linear2", MLP_OUT)]
    return found


def floating(model: nn.Module) -> list[LayerSite]:
    """Layers around the memory that stay in floating point."""
    pointer = model.get_submodule("object_pointer_proj")
    names = [f"{ENCODER}.projection", "mask_downsample", "object_pointer_proj.proj_in"]
    names += [f"object_pointer_proj.layers.{index}" for index in range(len(pointer.layers))]
    names.append("object_pointer_proj.proj_out")
    if isinstance(model.temporal_positional_encoding_projection_layer, nn.Linear):
        names.append("temporal_positional_encoding_projection_layer")
    return [LayerSite(name) for name in names]


def readers(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Norms of memory attention that one layer alone reads."""
    pairs = (("layer_norm2", "cross_attn_image.q_proj"), ("layer_norm3", "linear1"))
    return tuple((f"{layer}.{norm}", f"{layer}.{reader}") for layer in layers(model) for norm, reader in pairs)


def _count(module: nn.Module) -> range:
    return range(len(module.layers))


Follow = Callable[[nn.Module, "CalibrationImage"], object]


def parts(paths: tuple[str, ...], follow: Follow) -> tuple[Part, ...]:
    """The memory's parts: the encoder writes what the attention reads.

    Args:
        paths: :func:`stage_paths`; empty where the memory stays in floating point.
        follow: Follows the objects of a calibration image through its clip.
    """
    if not paths:
        return ()
    encoder, *attention = paths
    stages = tuple(Stage(path, partial(_run_layer, path), _to_next_layer) for path in attention)
    return (
        Part(ENCODER, partial(_enter_encoder, follow), (Stage(encoder, _run_encoder),)),
        Part(ATTENTION, partial(_enter_attention, follow), stages),
    )


def units(paths: tuple[str, ...], part: str) -> list[Unit]:
    """The unit of the memory encoder, or those of memory attention."""
    if not paths:
        return []
    encoder, *attention = paths
    if part == ENCODER:
        return [Unit(encoder, (encoder,), encoder, _run_encoder, _capture_encoder, channel_dim=1)]
    return [
        Unit(path, (path,), path, partial(_run_layer, path), partial(_capture_layer, path), reads=_READ)
        for path in attention
    ]


# The memory encoder: one item is a clip, its frames and objects along the first dimension.


def _enter_encoder(follow: Follow, model: nn.Module, _before: Tensors, image: CalibrationImage) -> Tensors:
    calls = calls_of([model.get_submodule(ENCODER)], lambda: follow(model, image))[0]
    # The first ones are of the frame that shows the objects, whose masks have hard borders.
    calls = calls[:: max(1, len(calls) // _ENCODED)][:_ENCODED]
    return {name: torch.cat([args[index] for args, _ in calls]) for index, name in enumerate(("features", "masks"))}


def _run_encoder(model: nn.Module, inputs: Tensors) -> Tensors:
    return {MEMORY: model.get_submodule(ENCODER)(inputs["features"], inputs["masks"])[0]}


def _capture_encoder(model: nn.Module, run_stage: Callable[[], object]) -> Tensors:
    args, _ = capture_call(model.get_submodule(ENCODER), run_stage)
    return {"features": args[0], "masks": args[1]}


# Memory attention.


def _enter_attention(follow: Follow, model: nn.Module, _before: Tensors, image: CalibrationImage) -> Tensors:
    """Inputs of the first layer on some frames of a clip: those that read as many memories as the image's age says."""
    module = model.get_submodule(ATTENTION)
    calls = [kwargs for _, kwargs in calls_of([module], lambda: follow(model, image))[0]]
    size = module.position_ids.shape[0]
    maps = [_maps(call, size) for call in calls]
    wanted = min(getattr(image, "age", max(maps)), max(maps))
    chosen = [call for call, count in zip(calls, maps) if count == wanted][-2 * OBJECTS :]
    # Where all maps are full, later frames read more pointers; those that all of them have are kept.
    pointers = min(call["num_object_pointer_tokens"] for call in chosen)
    items = [first_inputs(call, wanted * size + pointers, pointers) for call in chosen]
    return {name: torch.cat([item[name] for item in items]) for name in items[0]}


def _maps(call: dict, size: int) -> int:
    """How many memories a call reads, beside object pointers."""
    return (call["memory"].shape[0] - call["num_object_pointer_tokens"]) // size


def first_inputs(call: dict, length: int | None = None, pointers: int | None = None) -> Tensors:
    """Inputs of the first layer from the arguments of memory attention, as its ``forward`` makes them.

    Args:
        call: The arguments.
        length: Only so many tokens of the memory, from its beginning.
        pointers: How many of them are object pointers.

    Returns:
        ``queries`` (n, 1, h · w, C); ``keys`` and ``key_point_embedding`` (n, 1, tokens, c); ``pointers``
        (n, p), zeros whose number says how many of the last tokens are object pointers, which are not rotated.
    """
    queries = call["current_vision_features"]
    if call.get("current_vision_position_embeddings") is not None:
        queries = queries + 0.1 * call["current_vision_position_embeddings"]
    pointers = call["num_object_pointer_tokens"] if pointers is None else pointers
    queries = queries.transpose(0, 1)[:, None]
    return {
        "queries": queries,
        "keys": call["memory"][:length].transpose(0, 1)[:, None],
        "key_point_embedding": call["memory_posision_embeddings"][:length].transpose(0, 1)[:, None],
        "pointers": queries.new_zeros(len(queries), pointers),
    }


def _run_layer(path: str, model: nn.Module, inputs: Tensors) -> Tensors:
    module = model.get_submodule(ATTENTION)
    # Positions follow from the module alone; pairs of channels are turned by them.
    positions = module.rotary_emb(inputs["queries"], module.position_ids)
    queries = model.get_submodule(path)(
        queries=inputs["queries"],
        keys=inputs["keys"],
        key_point_embedding=inputs["key_point_embedding"],
        rope_position_embeddings=positions,
        num_k_exclude_rope=inputs["pointers"].shape[1],
    )
    return {"queries": queries}


def rotations(call: Mapping[str, Any]) -> tuple[Rotation, Rotation]:
    """How queries and keys of one of memory attention's attentions are turned.

    Keys of several memories repeat the positions of one; object pointers, the last keys, are not turned.
    """
    cos, sin = (each.reshape(-1, each.shape[-1]) for each in call["position_embeddings"])
    pointers = call.get("num_k_exclude_rope", 0)
    maps = (call["key"].shape[-2] - pointers) // len(cos)
    pads = cos.new_ones(pointers, cos.shape[1]), cos.new_zeros(pointers, cos.shape[1])
    repeated = (torch.cat([each.repeat(maps, 1), pad]) for each, pad in zip((cos, sin), pads))
    return Rotation(cos, sin), Rotation(*repeated)


def _to_next_layer(_model: nn.Module, inputs: Tensors, outputs: Tensors) -> Tensors:
    return {**inputs, **outputs}


def _capture_layer(path: str, model: nn.Module, run_stage: Callable[[], object]) -> Tensors:
    _, call = capture_call(model.get_submodule(path), run_stage)
    queries = call["queries"]
    pointers = queries.new_zeros(len(queries), call["num_k_exclude_rope"])
    return {
        "queries": queries,
        "keys": call["keys"],
        "key_point_embedding": call["key_point_embedding"],
        "pointers": pointers,
    }
