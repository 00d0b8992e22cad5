"""The modules of a SAM 2 with its memory by name, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from carsam.models.sam2.names import Sam2Names


class Sam2VideoNames(Sam2Names):
    """Names of ``Sam2VideoModel``: those of the image model, and the memory's."""

    family = "sam2_video"
    title = "SAM 2 with memory"
    model_types = ("sam2_video",)
    model_class = "Sam2VideoModel"
    processors = ("Sam2VideoProcessor", "Sam2ImageProcessor")
    regions: ClassVar[Mapping[str, str]] = {
        "vision_encoder.": "encoder blocks",
        "vision_encoder.neck": "encoder neck",
        "memory_encoder.": "memory encoder",
        "memory_attention.": "memory attention",
        "mask_decoder.transformer.": "decoder transformer",
    }
    prefixes: ClassVar[Mapping[str, str]] = {
        **Sam2Names.prefixes,
        "memory_attention.layers.": "memory.",
        "memory_encoder.": "memory encoder.",
    }
    order = (
        *("vision_encoder", "memory_encoder", "memory_attention", "mask_decoder"),
        *(name for name in Sam2Names.order if name not in ("vision_encoder", "mask_decoder", "self_attn", "mlp")),
        *("mask_downsampler", "feature_projection", "memory_fuser", "final_conv", "conv", "depthwise_conv"),
        *("pointwise_conv1", "pointwise_conv2"),
    )
    brief: ClassVar[Mapping[str, str]] = {**Sam2Names.brief, "cross_attn_image": "cross"}
