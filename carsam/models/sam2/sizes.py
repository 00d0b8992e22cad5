"""The published SAM 2s: what of their Hiera no tensor's shape shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PATCH = 16  # pixels of the input for a cell of the embedding


@dataclass(frozen=True)
class Architecture:
    """An image encoder.

    Attributes:
        width: Channels of the first stage.
        blocks: Of each stage.
        heads: Of the attentions of each stage.
        windows: Side of the windows of each stage.
        global_blocks: Blocks whose attention spans the image.
        background: Size of the position embedding that is stretched over the image.
        widths: Channels of each stage; doubled from one to the next if empty.
        decoder_width: Of the MLPs in the decoder.
    """

    width: int
    blocks: tuple[int, ...]
    heads: tuple[int, ...]
    windows: tuple[int, ...]
    global_blocks: tuple[int, ...]
    background: tuple[int, int]
    widths: tuple[int, ...] = ()
    decoder_width: int = 2048

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return self.widths or tuple(self.width * 2**stage for stage in range(len(self.blocks)))

    def parts(self, image_size: int) -> dict[str, dict[str, Any]]:
        """The three parts of a ``Sam2Config``, for an input of so many pixels."""
        grid = image_size // PATCH
        backbone = {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": self.width,
            "num_attention_heads": self.heads[0],
            "image_size": [image_size, image_size],
            "blocks_per_stage": list(self.blocks),
            "embed_dim_per_stage": list(self.channels),
            "num_attention_heads_per_stage": list(self.heads),
            "window_size_per_stage": list(self.windows),
            "global_attention_blocks": list(self.global_blocks),
            "window_positional_embedding_background_size": list(self.background),
        }
        vision = {
            "model_type": "sam2_vision_model",
            "backbone_config": backbone,
            "backbone_channel_list": list(reversed(self.channels)),
            "backbone_feature_sizes": [[scale * grid] * 2 for scale in (4, 2, 1)],
        }
        return {
            "vision_config": vision,
            "prompt_encoder_config": {"image_size": image_size, "patch_size": PATCH},
            "mask_decoder_config": {"mlp_dim": self.decoder_width},
        }


# By the names of the Hub's repositories.
ARCHITECTURES: dict[str, Architecture] = {
    "tiny": Architecture(96, (1, 2, 7, 2), (1, 2, 4, 8), (8, 4, 14, 7), (5, 7, 9), (7, 7)),
    "small": Architecture(96, (1, 2, 11, 2), (1, 2, 4, 8), (8, 4, 14, 7), (7, 10, 13), (7, 7)),
    "base-plus": Architecture(112, (2, 3, 16, 3), (2, 4, 8, 16), (8, 4, 14, 7), (12, 16, 20), (14, 14)),
    "large": Architecture(144, (2, 6, 36, 4), (2, 4, 8, 16), (8, 4, 16, 8), (23, 33, 43), (7, 7)),
}
