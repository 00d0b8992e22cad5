"""Configurations of the SAMs whose image encoder is a TinyViT: MobileSAM and LiteMedSAM.

TinyViT: Wu et al., "TinyViT: Fast Pretraining Distillation for Small Vision Transformers", 2022. MobileSAM: Zhang et
al., "Faster Segment Anything: Towards Lightweight SAM for Mobile Applications", 2023. LiteMedSAM: the baseline of the
CVPR 2024 challenge "Segment Anything in Medical Images on Laptop".
"""

import math
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import SamConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig, SamPromptEncoderConfig

MODEL_TYPE = "tinyvit_sam"
# What the patch embedding divides the image's sides by, for either of its published kernels.
PATCH_STRIDES = {3: 4, 1: 1}


@strict
class TinyVitConfig(PreTrainedConfig):
    """The image encoder: a convolutional stage, then stages of window attention, a merge between each two, the neck.

    Lists have one entry a stage; the lists of attention have none for the first stage, which has no attention.

    Attributes:
        num_channels: Channels of the image.
        image_size: Side of the square input, in pixels; a multiple of ``patch_size``.
        embed_dims: Width of each stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage after the first.
        window_sizes: Side of the attention windows, in cells, of each stage after the first.
        mlp_ratio: Hidden width of an MLP over the stage's width.
        expand_ratio: Hidden width of a convolutional block over the stage's width.
        patch_kernel: 3: two 3 × 3 convolutions of stride 2 before the first stage (MobileSAM); 1: two 1 × 1
            convolutions at full resolution (LiteMedSAM).
        merge_strides: What each merge divides the resolution by: 1 or 2. Both published models have 2, 2, 1.
        local_conv_size: Kernel of the depthwise convolution between attention and MLP; odd.
        output_channels: Channels of the image embedding.
        num_pos_feats: Fourier features of a position, which prompts and image share.
        hidden_act: The activation everywhere in the encoder.
        layer_norm_eps: Of the blocks' layer norms; the neck's have SAM's 1e-6.
    """

    base_config_key: ClassVar[str] = "vision_config"
    model_type: ClassVar[str] = "tinyvit_sam_vision"

    num_channels: int = 3
    image_size: int = 1024
    embed_dims: list[int] | tuple[int, ...] = (64, 128, 160, 320)
    depths: list[int] | tuple[int, ...] = (2, 2, 6, 2)
    num_heads: list[int] | tuple[int, ...] = (4, 5, 10)
    window_sizes: list[int] | tuple[int, ...] = (7, 14, 7)
    mlp_ratio: int | float = 4.0
    expand_ratio: int | float = 4.0
    patch_kernel: int = 3
    merge_strides: list[int] | tuple[int, ...] = (2, 2, 1)
    local_conv_size: int = 3
    output_channels: int = 256
    num_pos_feats: int = 128
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        lists = ("embed_dims", "depths", "num_heads", "window_sizes", "merge_strides")
        for name in lists:
            setattr(self, name, list(getattr(self, name)))  # JSON has lists; a configuration read back must be equal
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        """Refuses numbers that make no encoder.

        Raises:
            ValueError: With the setting's name.
        """
        stages = len(self.embed_dims)
        for name, length in (
            ("depths", stages),
            ("num_heads", stages - 1),
            ("window_sizes", stages - 1),
            ("merge_strides", stages - 1),
        ):
            if stages < 2 or len(getattr(self, name)) != length:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries with {stages} embed_dims; it must have one a stage "
                    "(num_heads, window_sizes and merge_strides: one fewer), of two stages or more."
                )
        numbers = [(name, getattr(self, name)) for name in ("num_channels", "output_channels", "num_pos_feats")]
        for name in ("embed_dims", "depths", "num_heads", "window_sizes", "merge_strides"):
            numbers += [(name, value) for value in getattr(self, name)]
        for name, value in numbers:
            if value < 1:
                raise ValueError(f"{name} has {value}; it must be at least 1.")
        if self.patch_kernel not in PATCH_STRIDES:
            raise ValueError(f"patch_kernel is {self.patch_kernel}; it must be 3 (MobileSAM) or 1 (LiteMedSAM).")
        if any(stride > 2 for stride in self.merge_strides):
            raise ValueError(f"merge_strides are {self.merge_strides}; each must be 1 or 2.")
        if self.embed_dims[0] % 2:
            raise ValueError(f"embed_dims[0] is {self.embed_dims[0]}; the patch embedding needs an even width.")
        if self.local_conv_size < 1 or self.local_conv_size % 2 == 0:
            raise ValueError(f"local_conv_size is {self.local_conv_size}; it must be odd.")
        for width, heads in zip(self.embed_dims[1:], self.num_heads):
            if width % heads:
                raise ValueError(f"{heads} heads do not divide a stage's width {width}.")
        for width in self.embed_dims:
            if min(width * self.mlp_ratio, width * self.expand_ratio) < 1:
                raise ValueError("mlp_ratio and expand_ratio must give at least one channel.")
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ValueError(f"image_size is {self.image_size}; it must be a positive multiple of {self.patch_size}.")

    @property
    def hidden_size(self) -> int:
        """Width of the last stage, which the neck reads."""
        return self.embed_dims[-1]

    @property
    def patch_size(self) -> int:
        """Pixels of the image per cell of the embedding: 16 in MobileSAM, 4 in LiteMedSAM."""
        return PATCH_STRIDES[self.patch_kernel] * math.prod(self.merge_strides)

    @property
    def num_hidden_layers(self) -> int:
        """How many modules the encoder's chain has before the neck: blocks and merges."""
        return sum(self.depths) + len(self.merge_strides)

    @property
    def scale(self) -> float:
        """Standard deviation that the Fourier features are drawn with (1, as in Meta's code)."""
        return 1.0


@strict
class TinyVitSamConfig(SamConfig):
    """A SAM with a TinyViT as its image encoder; prompt encoder and mask decoder are SAM's own.

    Attributes:
        vision_config: A :class:`TinyVitConfig`, or its values.
        prompt_encoder_config, mask_decoder_config: As in ``SamConfig``. Left out, the prompt encoder takes the image
            size and the embedding of ``vision_config``.
    """

    model_type: ClassVar[str] = MODEL_TYPE
    sub_configs_defaults: ClassVar[dict] = {
        "vision_config": TinyVitConfig,
        "prompt_encoder_config": SamPromptEncoderConfig,
        "mask_decoder_config": SamMaskDecoderConfig,
    }

    def __post_init__(self, **kwargs):
        # Before SamConfig sees them: its own vision_config would be a ViT's.
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = TinyVitConfig(**(self.vision_config or {}))
        vision = self.vision_config
        if self.prompt_encoder_config is None:
            self.prompt_encoder_config = {"image_size": vision.image_size, "patch_size": vision.patch_size}
        super().__post_init__(**kwargs)
        prompt = self.prompt_encoder_config
        grid = vision.image_size // vision.patch_size
        if (prompt.image_size, prompt.image_embedding_size) != (vision.image_size, grid):
            raise ValueError(
                f"prompt_encoder_config says {prompt.image_size} pixels with an embedding of "
                f"{prompt.image_embedding_size} cells, but the image encoder takes {vision.image_size} pixels and "
                f"makes {grid} cells (one per {vision.patch_size} pixels)."
            )
