"""Checks what the ``config.json`` of a TinyViT SAM declares against its weights, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carsam.errors import CheckpointError
from carsam.models.sam.declared import DECODER, PROMPT, VISION, Shapes, check_parts, check_size, contradiction, numbered
from carsam.models.tinyvit.configuration import TinyVitSamConfig
from carsam.models.tinyvit.modeling import TinyVitSamModel

# No TinyViT that was published has more than four.
MOST_STAGES = 16
# The input's side, which no tensor shows; twice the largest published.
LARGEST_INPUT = 2048


def check_declared(config: Mapping[str, Any], shapes: Shapes, source: str, *, weights_per_element: float = 1) -> None:
    """Refuses a configuration that declares more, or other, than the weights hold.

    Args:
        config: ``config.json`` as a mapping.
        shapes: Shape of every tensor in the weights by the names of ``TinyVitSamModel``.
        source: What errors call the model: its folder or Hub id.
        weights_per_element: How many weights one stored element can hold: 1, or 8 for the bytes of a packed model.

    Raises:
        CheckpointError: A setting is no usable number, contradicts the weights, or the parts contradict each other.
    """
    where = f"config.json of {source}"
    _check_lists(config.get(VISION), shapes, where)
    full = check_parts(TinyVitSamConfig, config, shapes, source, (PROMPT, DECODER))
    if full.vision_config.image_size > LARGEST_INPUT:
        raise CheckpointError(
            f"{where} declares an input of {full.vision_config.image_size} pixels, and no tensor of its weights "
            "confirms it."
        )
    declared = check_size(TinyVitSamModel, full, shapes, where, weights_per_element)
    for name, shape in declared.items():
        found = shapes.get(name)
        # The bytes of a packed weight lie in one dimension.
        if found is not None and len(found) == len(shape) and tuple(found) != shape:
            raise CheckpointError(
                f"{where} makes {name} {shape}, but its weights have {tuple(found)}. config.json and the weights "
                "belong to different models, or one is damaged; get both again from the same place."
            )


def _check_lists(vision: Any, shapes: Shapes, where: str) -> None:
    """The numbers of stages and blocks, before a model of so many is built.

    Raises:
        CheckpointError: They are no lists of whole numbers, or not as many as the weights have.
    """
    if not isinstance(vision, Mapping):
        raise CheckpointError(f"{where} does not describe a SAM: it has no {VISION}.")
    for name in ("embed_dims", "depths", "num_heads", "window_sizes", "merge_strides"):
        values = vision.get(name)
        whole = isinstance(values, list) and all(type(v) is int and 0 < v < 2**31 for v in values)
        if not whole or len(values) > MOST_STAGES:
            raise CheckpointError(
                f"{where} does not describe a SAM: {VISION}.{name} must be a list of at most {MOST_STAGES} whole "
                "numbers, at least 1 each."
            )
    for name in ("image_size", "num_channels", "patch_kernel", "local_conv_size", "output_channels", "num_pos_feats"):
        value = vision.get(name)
        if type(value) is not int or not 0 < value < 2**31:
            raise CheckpointError(
                f"{where} does not describe a SAM: {VISION}.{name} must be a whole number, at least 1."
            )
    if vision["num_channels"] != 3:
        raise CheckpointError(
            f"{where} describes a model of {vision['num_channels']} channels; carsam feeds RGB images."
        )
    declared, found = sum(vision["depths"]) + len(vision["merge_strides"]), numbered(shapes, LAYERS)
    if declared != found:
        raise contradiction(where, f"{VISION}: the number of blocks and merges", declared, found)
    if max(vision["window_sizes"]) > 4 * vision["image_size"]:
        raise CheckpointError(f"{where} does not describe a SAM: {VISION}.window_sizes are larger than the image.")


LAYERS = r"vision_encoder\.layers\.(\d+)\."
