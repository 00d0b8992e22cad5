"""SAM's modules by name, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from carsam.models.names import Names


class SamNames(Names):
    """Names of transformers' ``SamModel``: a ViT, its neck, the two-way decoder."""

    family = "sam"
    title = "SAM"
    model_types = ("sam",)
    model_class = "SamModel"
    processors = ("SamProcessor", "SamImageProcessor")
    encoder_config = "vision_config"
    decoder = "mask_decoder.transformer"
    blocks = "vision_encoder.layers"
    prefixes: ClassVar[Mapping[str, str]] = {"mask_decoder.transformer.": "decoder.", "vision_encoder.": "encoder."}
    regions: ClassVar[Mapping[str, str]] = {
        "vision_encoder.": "encoder blocks",
        "vision_encoder.neck": "encoder neck",
        "mask_decoder.transformer.": "decoder transformer",
    }
    order = (
        *("vision_encoder", "mask_decoder", "transformer", "layers", "neck", "final_attn_token_to_image"),
        *("self_attn", "attn", "cross_attn_token_to_image", "mlp", "cross_attn_image_to_token"),
        *("qkv", "q_proj", "k_proj", "v_proj", "query", "key", "value", "probs", "proj", "out_proj"),
        *("lin1", "lin2", "conv1", "conv2", "input", "weight"),
    )
    brief: ClassVar[Mapping[str, str]] = {
        "final_attn_token_to_image": "final",
        "cross_attn_token_to_image": "tok→img",
        "cross_attn_image_to_token": "img→tok",
        "self_attn": "self",
    }
    headings: ClassVar[Mapping[str, str]] = {"out_proj": "out"}
    registers: ClassVar[Mapping[str, str]] = {"transformers.models.sam.modeling_sam": "carsam.models.sam.attention"}
