"""Checks what the ``config.json`` of a SAM 2 declares against its weights, before anything is built.

Lists and counts first, since a million declared blocks take minutes to build; then the declared model is built without
memory and every shape compared. What no tensor shows (windows, heads, the input's side) must be possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from carsam.errors import CheckpointError
from carsam.models.sam.declared import DECODER, PROMPT, VISION, Shapes, check_size, contradiction, numbered
from carsam.models.skeleton import BAD_CONFIG

BACKBONE, WITH_MEMORY = "backbone_config", "sam2_video"
# No published Hiera has more; twice the largest published input.
MOST_STAGES, MOST_BLOCKS, LARGEST_INPUT, LARGEST_SIDE, MOST_MODULES = 16, 1024, 2048, 2**15, 256
# One whole number for each of Hiera's stages.
PER_STAGE = ("blocks_per_stage", "embed_dim_per_stage", "num_attention_heads_per_stage", "window_size_per_stage")
PAIRS = ("patch_kernel_size", "patch_stride", "query_stride", "window_positional_embedding_background_size")
# Numbered modules: the part of the configuration (empty: the whole), the setting, by what it differs from the count.
COUNTS: tuple[tuple[str, str, int, str], ...] = (
    (DECODER, "num_hidden_layers", 0, r"mask_decoder\.transformer\.layers\.(\d+)\."),
    (DECODER, "num_multimask_outputs", -1, r"mask_decoder\.output_hypernetworks_mlps\.(\d+)\."),
    (DECODER, "iou_head_depth", 2, r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\."),
    ("", "memory_attention_num_layers", 0, r"memory_attention\.layers\.(\d+)\."),
    ("", "memory_fuser_num_layers", 0, r"memory_encoder\.memory_fuser\.layers\.(\d+)\."),
)
BLOCKS = r"vision_encoder\.backbone\.blocks\.(\d+)\."
LEVELS = r"vision_encoder\.neck\.convs\.(\d+)\."


def check_declared(
    model_class: type[PreTrainedModel],
    config: Mapping[str, Any],
    shapes: Shapes,
    source: str,
    *,
    weights_per_element: float = 1,
) -> None:
    """Refuses a configuration that declares more, or other, than the weights hold.

    Args:
        model_class: Of the declared model.
        config: ``config.json`` as a mapping.
        shapes: Shape of every tensor in the weights, by transformers' names.
        source: What errors call the model: its folder or Hub id.
        weights_per_element: How many weights one stored element can hold: 1, or more for the bytes of a packed model.

    Raises:
        CheckpointError: A setting is no usable number, contradicts the weights, or the parts contradict each other.
    """
    where = f"config.json of {source}"
    if why := _unusable(config):
        raise CheckpointError(f"{where} does not describe a SAM 2: {why}.")
    try:
        full = model_class.config_class.from_dict(dict(config))
        plain = full.to_dict()
    except BAD_CONFIG as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{where} does not describe a SAM 2: {line[:200]}") from error
    # Defaults are settings too.
    if why := _unusable(plain, complete=True) or _impossible(plain):
        raise CheckpointError(f"{where} does not describe a SAM 2: {why}.")
    for setting, declared, found in _counts(plain, shapes):
        if declared != found:
            raise contradiction(where, setting, declared, found)
    expected = check_size(model_class, full, shapes, where, weights_per_element)
    for name, shape in expected.items():
        found = shapes.get(name)
        # The bytes of a packed weight lie in one dimension.
        if found is not None and len(found) == len(shape) and tuple(found) != shape:
            raise CheckpointError(
                f"{where} makes {name} {shape}, but its weights have {tuple(found)}. config.json and the weights "
                "belong to different models, or one is damaged; get both again from the same place."
            )


def too_large(config: PreTrainedConfig, layers: Sequence[str]) -> str:
    """What makes a packed model's configuration one that would take for ever to build; empty where nothing does.

    Args:
        config: As transformers read it.
        layers: Module paths that the layout names.
    """
    plain = config.to_dict()
    if why := _unusable(plain, complete=True) or _impossible(plain):
        return why
    names = [f"{layer}." for layer in layers]
    for setting, declared, found in _counts(plain, names):
        # A packed layout names what is quantized: the heads and the memory are not among it.
        if found > 0 and declared != found and not setting.endswith(("iou_head_depth", "num_multimask_outputs")):
            return f"{setting} is {declared}, but its layout names {found}"
    return ""


def _counts(plain: Mapping[str, Any], names: Shapes | Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(setting, declared, found) of everything that is numbered."""
    backbone = plain[VISION][BACKBONE]
    yield f"{VISION}.{BACKBONE}: the number of blocks", sum(backbone["blocks_per_stage"]), numbered(names, BLOCKS)
    yield f"{VISION}: the number of levels", len(plain[VISION]["backbone_channel_list"]), numbered(names, LEVELS)
    for part, setting, offset, pattern in COUNTS:
        if part:
            yield f"{part}.{setting}", plain[part][setting], numbered(names, pattern) + offset
        elif plain.get("model_type") == WITH_MEMORY:  # an image model's may have the memory's settings left over
            yield setting, plain[setting], numbered(names, pattern) + offset


def _unusable(config: Mapping[str, Any], *, complete: bool = False) -> str:
    """What in a configuration is no number that a size can come from; empty where all are.

    Args:
        config: As a mapping.
        complete: Whether defaults are filled in, so that a part that is missing is a fault.
    """
    vision = config.get(VISION)
    backbone = vision.get(BACKBONE) if isinstance(vision, Mapping) else None
    sections = {VISION: vision, f"{VISION}.{BACKBONE}": backbone}
    sections |= {name: config.get(name) for name in (PROMPT, DECODER)}
    for name, section in sections.items():
        if not isinstance(section, Mapping) and not (section is None and not complete):
            return f"{name} is {str(section)[:40]!r}, not a mapping"
    for name, section in {"": config, **sections}.items():
        for key, value in (section or {}).items():
            if why := _unusable_number(key, value):
                return f"{name}.{key} is {str(value)[:40]}; it must be {why}".removeprefix(".")
    vision, backbone = vision or {}, backbone or {}
    for key in PER_STAGE:
        values = backbone.get(key)
        if values is None and not complete:
            continue
        whole = isinstance(values, (list, tuple)) and all(_whole(value) for value in values)
        if not whole or not 1 <= len(values) <= MOST_STAGES or max(values) > LARGEST_SIDE:
            listed = f"a list of at most {MOST_STAGES} whole numbers from 1 to {LARGEST_SIDE}"
            return f"{VISION}.{BACKBONE}.{key} must be {listed}"
    for section, key in ((vision, "backbone_channel_list"), *((backbone, key) for key in PAIRS)):
        values = section.get(key)
        listed = values if isinstance(values, (list, tuple)) else [values]
        if values is None and not complete:
            continue
        if len(listed) > MOST_STAGES or not all(_whole(value) and value <= LARGEST_SIDE for value in listed):
            return f"{key} is {str(values)[:40]}; it must hold whole numbers from 1 to {LARGEST_SIDE}"
    return ""


def _whole(value: object) -> bool:
    return type(value) is int and value >= 1


# Of numbers that are counts of modules; others that end like sizes are sides of tensors.
_MODULE_COUNTS = ("_num_layers", "num_hidden_layers", "num_multimask_outputs", "iou_head_depth", "num_point_embeddings")
_SIDES = ("hidden_size", "_dim", "_channels", "kernel_size", "_stride", "num_channels", "num_maskmem", "patch_size")


def _unusable_number(key: str, value: object) -> str:
    """What a setting must be that it is not; empty where it is, or its name is that of none that makes sizes."""
    if isinstance(value, (list, tuple, Mapping)) or value is None:
        return ""
    for most, endings in ((MOST_MODULES, _MODULE_COUNTS), (LARGEST_SIDE, _SIDES)):
        if key.endswith(endings) and not (_whole(value) and value <= most):
            return f"a whole number from 1 to {most}"
    if key in ("layer_norm_eps",) and not (isinstance(value, (int, float)) and 0 <= value < 1):
        return "a number from 0 to 1"
    if key == "mlp_ratio" and not (isinstance(value, (int, float)) and 0 < value <= 64):
        return "a number up to 64"
    return ""


def _impossible(plain: Mapping[str, Any]) -> str:
    """What in a usable configuration cannot be; empty where all can."""
    vision, prompt, decoder = plain[VISION], plain[PROMPT], plain[DECODER]
    backbone = vision[BACKBONE]
    stages = {key: len(backbone[key]) for key in PER_STAGE}
    if len({*stages.values(), len(vision["backbone_channel_list"])}) > 1:
        return f"its lists are not of one length: {', '.join(f'{key} {count}' for key, count in stages.items())}"
    if sum(backbone["blocks_per_stage"]) > MOST_BLOCKS:
        return f"it has {sum(backbone['blocks_per_stage'])} blocks, and no SAM 2 has more than {MOST_BLOCKS}"
    if list(reversed(vision["backbone_channel_list"])) != list(backbone["embed_dim_per_stage"]):
        return f"backbone_channel_list {vision['backbone_channel_list']} is not embed_dim_per_stage from the end"
    for width, heads in zip(backbone["embed_dim_per_stage"], backbone["num_attention_heads_per_stage"]):
        if width % heads:
            return f"{heads} heads do not divide the width {width}"
    size, patch = _square(prompt["image_size"]), _square(prompt["patch_size"])
    if not (_whole(size) and _whole(patch) and size % (4 * patch) == 0 and size <= LARGEST_INPUT):
        return (
            f"{PROMPT}.image_size is {str(prompt['image_size'])[:40]} and patch_size {str(prompt['patch_size'])[:40]}; "
            f"the input must be a square of at most {LARGEST_INPUT} pixels, in patches"
        )
    if backbone["num_channels"] != 3:
        return f"it takes images of {backbone['num_channels']} channels, and carsam feeds RGB images"
    grid = size // patch
    sizes = [list(pair) if isinstance(pair, (list, tuple)) else pair for pair in vision["backbone_feature_sizes"]]
    if vision["num_feature_levels"] != 3 or sizes != [[scale * grid] * 2 for scale in (4, 2, 1)]:
        return f"backbone_feature_sizes {str(sizes)[:60]} are not those of an input of {size} pixels"
    if "image_size" in plain and _square(plain["image_size"]) != size:
        return f"image_size is {str(plain['image_size'])[:40]}, {PROMPT}.image_size is {size}; they must be the same"
    if max(backbone["window_size_per_stage"]) > size:
        return f"windows of {max(backbone['window_size_per_stage'])} are larger than the image"
    wrong = [index for index in backbone["global_attention_blocks"] or () if type(index) is not int]
    if wrong:
        return "global_attention_blocks must hold whole numbers"
    rate, heads = decoder["attention_downsample_rate"], decoder["num_attention_heads"]
    if not (_whole(rate) and _whole(heads)) or decoder["hidden_size"] % (rate * heads):
        return f"{str(heads)[:40]} heads do not divide the decoder's attention"
    return ""


def _square(value: object) -> object:
    """The side of a square that may be written as two."""
    if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
        return value[0]
    return value
