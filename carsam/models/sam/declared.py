"""Checks what a config.json declares against the tensors of the weights, before anything is built or allocated.

A declared number costs its author nothing: a million layers take minutes to build, a width of 1e9 takes all memory. The
names and shapes in the header of the weights file are backed by the file's own bytes, so they are what is believed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from transformers import PreTrainedModel, SamConfig, SamModel

from carsam.errors import CheckpointError
from carsam.models.skeleton import BAD_CONFIG, skeleton

Shapes = Mapping[str, Sequence[int]]
Config = TypeVar("Config", bound=SamConfig)

VISION, PROMPT, DECODER = "vision_config", "prompt_encoder_config", "mask_decoder_config"
# Whole numbers of each part; all must be at least 1, but for those of AT_LEAST_ZERO.
WHOLE: dict[str, tuple[str, ...]] = {
    VISION: (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_channels",
        "image_size",
        "patch_size",
        "mlp_dim",
        "window_size",
        "output_channels",
        "num_pos_feats",
    ),
    PROMPT: (
        "hidden_size",
        "image_size",
        "patch_size",
        "image_embedding_size",
        "mask_input_channels",
        "num_point_embeddings",
    ),
    DECODER: (
        "hidden_size",
        "mlp_dim",
        "num_hidden_layers",
        "num_attention_heads",
        "attention_downsample_rate",
        "num_multimask_outputs",
        "iou_head_depth",
        "iou_head_hidden_dim",
    ),
}
AT_LEAST_ZERO = {(VISION, "window_size")}
# What a config.json may leave to be derived.
OPTIONAL = {(VISION, "mlp_dim")}

# How many numbered modules of each kind there are: setting, what it differs by from the count, and their names.
COUNTS: tuple[tuple[str, str, int, str], ...] = (
    (VISION, "num_hidden_layers", 0, r"vision_encoder\.layers\.(\d+)\."),
    (PROMPT, "num_point_embeddings", 0, r"prompt_encoder\.point_embed\.(\d+)\."),
    (DECODER, "num_hidden_layers", 0, r"mask_decoder\.transformer\.layers\.(\d+)\."),
    # One mask token more than masks: SAM's single-mask output.
    (DECODER, "num_multimask_outputs", -1, r"mask_decoder\.output_hypernetworks_mlps\.(\d+)\."),
    # The first and the last layer of the head have names of their own.
    (DECODER, "iou_head_depth", 2, r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\."),
)
# A tensor and the dimension that shows a setting. All of them stay in floating point when the model is quantized, so
# they have the same shape in a packed folder.
WITNESSES: tuple[tuple[str, str, str, int], ...] = (
    (VISION, "hidden_size", "vision_encoder.layers.0.layer_norm1.weight", 0),
    (VISION, "mlp_dim", "vision_encoder.layers.0.mlp.lin1.bias", 0),
    (VISION, "output_channels", "vision_encoder.neck.layer_norm1.weight", 0),
    (VISION, "num_channels", "vision_encoder.patch_embed.projection.weight", 1),
    (VISION, "patch_size", "vision_encoder.patch_embed.projection.weight", 2),
    (VISION, "num_pos_feats", "shared_image_embedding.positional_embedding", 1),
    (VISION, "num_pos_feats", "prompt_encoder.shared_embedding.positional_embedding", 1),
    (PROMPT, "hidden_size", "prompt_encoder.no_mask_embed.weight", 1),
    (PROMPT, "mask_input_channels", "prompt_encoder.mask_embed.conv2.bias", 0),
    (DECODER, "hidden_size", "mask_decoder.iou_token.weight", 1),
    (DECODER, "mlp_dim", "mask_decoder.transformer.layers.0.mlp.lin1.bias", 0),
    (DECODER, "iou_head_hidden_dim", "mask_decoder.iou_prediction_head.proj_in.bias", 0),
)
# The input's side where no tensor shows it (no position embedding at all); twice the largest published.
LARGEST_UNSHOWN_INPUT = 2048


def contiguous_count(numbers: Iterable[int]) -> int:
    """How many of 0, 1, 2, ... there are before the first gap: a lone layer 3000000 counts nothing."""
    found = set(numbers)
    count = 0
    while count in found:
        count += 1
    return count


def numbered(names: Iterable[str], pattern: str) -> int:
    """How many modules of a kind there are, by the number that ``pattern`` captures at the start of their names.

    Numbers of more than nine digits are no layer's.
    """
    matches = (re.match(pattern, name) for name in names)
    return contiguous_count(int(match[1]) for match in matches if match and len(match[1]) < 10)


def check_declared(config: Mapping[str, Any], shapes: Shapes, source: str, *, weights_per_element: float = 1) -> None:
    """Refuses a configuration that declares more, or other, than the weights hold.

    Takes milliseconds and no memory whatever the configuration says. Names that are missing or left over are for the
    loader to report; after this check, building the model allocates no more than the file holds.

    Args:
        config: ``config.json`` as a mapping.
        shapes: Shape of every tensor in the weights by transformers' name.
        source: What errors call the model: its folder or Hub id.
        weights_per_element: How many weights one stored element can hold: 1, or 8 for the bytes of a packed model.

    Raises:
        CheckpointError: A setting is no usable number, contradicts the weights, or the parts contradict each other.
    """
    where = f"config.json of {source}"
    full = check_parts(SamConfig, config, shapes, source, (VISION, PROMPT, DECODER))
    indexes, layers = full.vision_config.global_attn_indexes, full.vision_config.num_hidden_layers
    wrong = [index for index in indexes if isinstance(index, bool) or not 0 <= index < layers]
    if wrong:
        raise CheckpointError(
            f"{where} does not describe a SAM: {VISION}.global_attn_indexes names layer {_show(wrong[0])}, of "
            f"{layers} layers."
        )
    _check_heads(full, shapes, where)
    _check_input(full, shapes, where)
    check_size(SamModel, full, shapes, where, weights_per_element)


def check_parts(
    kind: type[Config], config: Mapping[str, Any], shapes: Shapes, source: str, parts: tuple[str, ...]
) -> Config:
    """Checks parts of a configuration that SAM and models like it have, and reads it.

    Args:
        kind: Class of the configuration.
        config: ``config.json`` as a mapping.
        shapes: Shape of every tensor in the weights.
        source: What errors call the model.
        parts: Names of the parts.

    Raises:
        CheckpointError: A setting is no usable number or contradicts the weights.
    """
    where = f"config.json of {source}"
    empty = next((name for name, shape in shapes.items() if 0 in tuple(shape)), None)
    if empty is not None:
        raise CheckpointError(f"the weights in {source} are damaged: {empty} is empty. Get them again.")
    _check_types(config, where, parts)
    try:
        full = kind.from_dict(dict(config))
    except BAD_CONFIG as error:
        raise CheckpointError(f"{where} does not describe a SAM: {_gist(error)}") from error
    _check_counts(full, shapes, where, parts)
    _check_numbers(full, where, parts)
    _check_witnesses(full, shapes, where, parts)
    return full


def check_size(
    model: type[PreTrainedModel], config: SamConfig, shapes: Shapes, where: str, weights_per_element: float
) -> dict[str, Any]:
    """Refuses a configuration that declares more weights than there are numbers.

    Returns:
        Shape of every tensor of the declared model.

    Raises:
        CheckpointError: It does, or its parts contradict each other.
    """
    try:
        declared = {name: tuple(tensor.shape) for name, tensor in skeleton(model, config).state_dict().items()}
    except BAD_CONFIG as error:
        raise CheckpointError(f"{where} does not describe a SAM: {_gist(error)}") from error
    parameters = sum(math.prod(shape) for shape in declared.values())
    stored = sum(math.prod(shape) for shape in shapes.values())
    # The tied Fourier features may be stored once; a factor of two lets through what the loader then reports by name.
    if parameters > 2 * weights_per_element * stored:
        raise CheckpointError(
            f"{where} declares a model of {parameters:,} weights, but its weights hold {stored:,} numbers; they are "
            "incomplete, or belong to another model."
        )
    return declared


def _check_types(config: Mapping[str, Any], where: str, parts: tuple[str, ...]) -> None:
    """The settings that sizes come from, as they stand in the file, before transformers computes with them."""
    for part in parts:
        names, section = WHOLE[part], config.get(part)
        if section is None:
            continue
        if not isinstance(section, Mapping):
            raise CheckpointError(f"{where} does not describe a SAM: {part} is {_show(section)}, not a mapping.")
        for name in names:
            if name not in section or (section[name] is None and (part, name) in OPTIONAL):
                continue
            value, least = section[name], 0 if (part, name) in AT_LEAST_ZERO else 1
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
                raise CheckpointError(
                    f"{where} does not describe a SAM: {part}.{name} is {_show(value)}; it must be a whole number, at "
                    f"least {least}."
                )


def _check_numbers(config: SamConfig, where: str, parts: tuple[str, ...]) -> None:
    """The settings that no tensor shows but that decide what the model computes."""
    settings = [(part, "layer_norm_eps", 0.0, 1.0) for part in parts]
    settings += [(part, "attention_dropout", 0.0, 1.0) for part in parts if part == VISION]
    for part, name, low, high in settings:
        value = getattr(getattr(config, part), name, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
            raise CheckpointError(
                f"{where} does not describe a SAM: {part}.{name} is {_show(value)}; it must be a number from {low:g} "
                f"to {high:g}."
            )


def _check_counts(config: SamConfig, shapes: Shapes, where: str, parts: tuple[str, ...]) -> None:
    for part, name, offset, pattern in COUNTS:
        if part not in parts:
            continue
        declared, found = getattr(getattr(config, part), name), numbered(shapes, pattern) + offset
        if declared != found:
            raise contradiction(where, f"{part}.{name}", declared, found)


def _check_witnesses(config: SamConfig, shapes: Shapes, where: str, parts: tuple[str, ...]) -> None:
    decoder = config.mask_decoder_config
    for part, name, tensor, dimension in WITNESSES:
        if part not in parts:
            continue
        declared, found = getattr(getattr(config, part), name), _side(shapes, tensor, dimension)
        if found is not None and declared != found:
            raise contradiction(where, f"{part}.{name}", declared, found, tensor)
    inner = _side(shapes, "mask_decoder.transformer.final_attn_token_to_image.q_proj.bias", 0)
    if inner is not None and decoder.hidden_size // decoder.attention_downsample_rate != inner:
        found = decoder.hidden_size // inner
        declared = decoder.attention_downsample_rate
        raise contradiction(where, f"{DECODER}.attention_downsample_rate", declared, found)
    if inner is not None and inner % decoder.num_attention_heads:
        raise CheckpointError(
            f"{where} does not describe a SAM: {DECODER}.num_attention_heads is {decoder.num_attention_heads}, which "
            f"does not divide its attention's {inner} channels."
        )


def _check_heads(config: SamConfig, shapes: Shapes, where: str) -> None:
    """The heads of the image encoder."""
    vision = config.vision_config
    heads = _side(shapes, "vision_encoder.layers.0.attn.rel_pos_h", 1)
    if heads is not None and vision.num_attention_heads * heads != vision.hidden_size:
        found = vision.hidden_size // heads
        raise contradiction(where, f"{VISION}.num_attention_heads", vision.num_attention_heads, found)
    if vision.hidden_size % vision.num_attention_heads:
        raise CheckpointError(
            f"{where} does not describe a SAM: {vision.num_attention_heads} heads do not divide the width "
            f"{vision.hidden_size}."
        )


def _check_input(config: SamConfig, shapes: Shapes, where: str) -> None:
    """The input's side: the parts must agree, and the position embeddings show it."""
    vision, prompt = config.vision_config, config.prompt_encoder_config
    for name in ("image_size", "patch_size"):
        ours, theirs = getattr(vision, name), getattr(prompt, name)
        if ours != theirs:
            raise CheckpointError(
                f"{where} does not describe a SAM: {VISION}.{name} is {ours}, {PROMPT}.{name} is {theirs}; they must "
                "be the same."
            )
    if vision.num_channels != 3:
        raise CheckpointError(f"{where} describes a model of {vision.num_channels} channels; carsam feeds RGB images.")
    grid = vision.image_size // vision.patch_size
    if prompt.image_embedding_size != grid:
        raise contradiction(where, f"{PROMPT}.image_embedding_size", prompt.image_embedding_size, grid)
    shown = _side(shapes, "vision_encoder.pos_embed", 1) if vision.use_abs_pos else None
    if shown is None and vision.use_rel_pos and vision.global_attn_indexes:
        rows = _side(shapes, f"vision_encoder.layers.{vision.global_attn_indexes[0]}.attn.rel_pos_h", 0)
        shown = None if rows is None else (rows + 1) // 2
    if shown is not None and grid != shown:
        raise contradiction(where, f"{VISION}.image_size", vision.image_size, shown * vision.patch_size)
    if shown is None and vision.image_size > LARGEST_UNSHOWN_INPUT:
        raise CheckpointError(
            f"{where} declares an input of {vision.image_size} pixels, and no tensor of its weights confirms it."
        )
    # A window wider than the grid is padded to; relative positions show it where there are any.
    windowed = [i for i in range(vision.num_hidden_layers) if i not in set(vision.global_attn_indexes)]
    if windowed and vision.window_size:
        rows = _side(shapes, f"vision_encoder.layers.{windowed[0]}.attn.rel_pos_h", 0) if vision.use_rel_pos else None
        if rows is not None and rows != 2 * vision.window_size - 1:
            raise contradiction(where, f"{VISION}.window_size", vision.window_size, (rows + 1) // 2)
        if rows is None and vision.window_size > 4 * grid:
            raise CheckpointError(
                f"{where} does not describe a SAM: {VISION}.window_size is {vision.window_size}, on a grid of {grid}."
            )


def _side(shapes: Shapes, name: str, dimension: int) -> int | None:
    """One side of a tensor; None where the weights have no such tensor or it has too few dimensions."""
    shape = shapes.get(name)
    return None if shape is None or len(shape) <= dimension else int(shape[dimension])


def contradiction(where: str, setting: str, declared: object, found: int, tensor: str = "") -> CheckpointError:
    shown = f" ({tensor})" if tensor else ""
    return CheckpointError(
        f"{where} says that {setting} is {_show(declared)}, but its weights have {found}{shown}. config.json and the "
        "weights belong to different models, or one is damaged; get both again from the same place."
    )


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _gist(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])[:300] if lines else type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


# No published SAM comes near; 2**15 to the power of four still fits in 64 bits, so shapes cannot overflow.
_LARGEST_SIDE, _MOST_MODULES = 2**15, 256


def too_large(
    config: SamConfig,
    layers: Sequence[str],
    vision: Sequence[str] = ("hidden_size", "patch_size", "mlp_dim", "num_attention_heads"),
) -> str:
    """What makes a packed model's configuration one that would take for ever to build; empty where nothing does.

    Args:
        config: As transformers read it.
        layers: Module paths that the layout names.
        vision: Settings of the image encoder that are sides of tensors, beside those that all encoders have.
    """
    parts = [getattr(config, name, None) for name in (VISION, PROMPT, DECODER)]
    if None in parts:
        return "it describes no SAM"
    encoder, prompt, decoder = parts
    for part, prefix in ((encoder, r"vision_encoder\.layers"), (decoder, r"mask_decoder\.transformer\.layers")):
        found = numbered(layers, prefix + r"\.(\d+)\.")
        if part.num_hidden_layers != found:
            where = prefix.replace("\\", "")
            return f"{where} number {part.num_hidden_layers}, but its layout names {found}"
    sides = [
        *((encoder, name) for name in (*vision, "image_size", "num_channels", "output_channels", "num_pos_feats")),
        *((prompt, name) for name in ("hidden_size", "image_size", "patch_size", "mask_input_channels")),
        *((decoder, name) for name in ("hidden_size", "mlp_dim", "iou_head_hidden_dim", "num_attention_heads")),
    ]
    counts = [(prompt, "num_point_embeddings"), (decoder, "num_multimask_outputs"), (decoder, "iou_head_depth")]
    for most, settings in ((_LARGEST_SIDE, sides), (_MOST_MODULES, counts)):
        for part, name in settings:
            value = getattr(part, name, 1)
            if type(value) is not int or not 1 <= value <= most:
                return f"{name} is {str(value)[:40]}, but it must be a whole number from 1 to {most}"
    return ""
