"""Whether a model is the embedded stand-in, or was made from it: its scores say nothing about SAM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from carsam.models.names import names_of_type

# The image encoder of embedded/sam-nano-256. Meta's have 768, 1024 or 1280 channels and see 1024 pixels.
_ENCODER = {"hidden_size": 192, "num_hidden_layers": 8, "num_attention_heads": 3, "image_size": 256, "patch_size": 16}
_NAME = re.compile(r"\bsam-nano\b")


def is_stand_in(config: Mapping[str, Any], base: str) -> bool:
    """Tells by the encoder, which a renamed copy and the stressed twin share, and by the name of the model.

    Args:
        config: What ``config.json`` holds.
        base: Name of the model that the packed one was made from; empty where it is not known.
    """
    encoder = names_of_type(config.get("model_type")).encoder_settings(config)
    return all(encoder.get(key) == value for key, value in _ENCODER.items()) or _NAME.search(base) is not None
