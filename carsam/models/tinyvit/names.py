"""The modules of a SAM with a TinyViT by name, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from carsam.models.sam.names import SamNames


class TinyVitNames(SamNames):
    """Names of ``TinyVitSamModel``: blocks and merges of all stages in one list, then SAM's neck and decoder."""

    family = "tinyvit"
    title = "TinyViT SAM"
    model_types = ("tinyvit_sam",)
    model_class = "TinyVitSamModel"
    library = "carsam"
    row = "layer"
    regions: ClassVar[Mapping[str, str]] = {**SamNames.regions, "vision_encoder.": "encoder stages"}
    # The depthwise convolution of a block stands between its attention and its MLP.
    order = tuple(part for name in SamNames.order for part in ((name, "local_conv") if name == "attn" else (name,)))
    configuration = "carsam.models.tinyvit.modeling.TinyVitSamConfig"
    headings: ClassVar[Mapping[str, str]] = {**SamNames.headings, "local_conv": "conv"}
