"""Whether a packed model was made from the embedded stand-in, whose scores say nothing about SAM."""

from __future__ import annotations

import re
from typing import Any

from carsam.report.order import mapping
from carsam.report.source import Source

# The image encoder of embedded/sam-nano-256. Meta's have 768, 1024 or 1280 channels and see 1024 pixels.
_ENCODER = {"hidden_size": 192, "num_hidden_layers": 8, "num_attention_heads": 3, "image_size": 256, "patch_size": 16}
_NAME = re.compile(r"\bsam-nano\b")


def is_stand_in(source: Source) -> bool:
    """Tells by the encoder, which a renamed copy and the stressed twin share, and by the name of the model."""
    encoder: dict[str, Any] = mapping(source.config.get("vision_config"))
    if all(encoder.get(key) == value for key, value in _ENCODER.items()):
        return True
    return _NAME.search(str(source.recipe.get("model") or "")) is not None
