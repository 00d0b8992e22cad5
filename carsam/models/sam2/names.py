"""The modules of a SAM 2 by name, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from carsam.models.sam.names import SamNames


class Sam2Names(SamNames):
    """Names of ``Sam2Model``: Hiera's blocks, the neck of the pyramid, the two-way decoder."""

    family = "sam2"
    title = "SAM 2"
    model_types = ("sam2",)
    model_class = "Sam2Model"
    processors = ("Sam2Processor", "Sam2ImageProcessor")
    blocks = "vision_encoder.backbone.blocks"
    prefixes: ClassVar[Mapping[str, str]] = {
        "mask_decoder.transformer.": "decoder.",
        "vision_encoder.backbone.": "encoder.",
        "vision_encoder.": "encoder.",
    }
    # A block's own projection, where the width changes, runs before its attention.
    order = (
        *("vision_encoder", "backbone", "blocks", "neck", "mask_decoder", "transformer", "layers"),
        *("final_attn_token_to_image", "self_attn", "cross_attn_token_to_image", "attn", "mlp"),
        *("cross_attn_image_to_token", "qkv", "q_proj", "k_proj", "v_proj", "query", "key", "value", "probs", "proj"),
        *("o_proj", "proj_in", "proj_out", "convs", "input", "weight"),
    )
    headings: ClassVar[Mapping[str, str]] = {"o_proj": "out", "proj_in": "in", "proj_out": "out"}
    registers: ClassVar[Mapping[str, str]] = {}
