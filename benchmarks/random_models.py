"""Models of published sizes with random weights, by one name each: ``vit-b``, ``sam2-tiny``."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from carsam.errors import ConfigError
from carsam.models.sam.random import SIZES, random_sam, sam_config
from carsam.models.sam2.random import SIZES as SAM2_SIZES
from carsam.models.sam2.random import random_sam2, sam2_config

SAM2 = "sam2-"
NAMES = (*(name for name in SIZES if name != "nano"), *(f"{SAM2}{name}" for name in SAM2_SIZES if name != "nano"))


def random_model(name: str, blocks: int | None = None) -> PreTrainedModel:
    """A model at 1024 px; a SAM 2 without its memory, whose calibration would follow clips.

    Args:
        name: One of :data:`NAMES`.
        blocks: Only so many blocks of a SAM's image encoder.

    Raises:
        ConfigError: There is no such name, or a SAM 2 is to have fewer blocks.
    """
    config_of(name, blocks)
    if name.startswith(SAM2):
        return random_sam2(name.removeprefix(SAM2))
    return random_sam(name, blocks=blocks)


def config_of(name: str, blocks: int | None = None) -> PreTrainedConfig:
    """The configuration of :func:`random_model`; arguments and errors as there."""
    if name not in NAMES:
        raise ConfigError(f"there is no random model {name!r}; choose from {', '.join(NAMES)}.")
    if not name.startswith(SAM2):
        return sam_config(name, blocks=blocks)
    if blocks is not None:
        raise ConfigError("the blocks of a SAM 2 are of several widths and cannot be left out.")
    return sam2_config(name.removeprefix(SAM2))
