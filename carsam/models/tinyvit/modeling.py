"""A SAM whose image encoder is a TinyViT (MobileSAM, LiteMedSAM), in the form that inference needs.

Every batch norm of the published model is folded into the convolution before it (``meta.py`` does that while loading),
so the encoder consists of ``nn.Conv2d`` and ``nn.Linear`` with biases, and layer norms. It is a flat chain: the patch
embedding, then ``layers`` (blocks and merges in the order of execution), then the neck. Each takes one tensor and
returns one, with channels last: (batch, height, width, channels), as SAM's own blocks do; the neck returns channels
first, as SAM's does.

Prompt encoder and mask decoder are transformers' own, and ``TinyVitSamModel`` is a ``SamModel``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.sam.modeling_sam import (
    SamMaskDecoder,
    SamModel,
    SamPositionalEmbedding,
    SamPreTrainedModel,
    SamPromptEncoder,
    SamVisionEncoderOutput,
    SamVisionNeck,
    eager_attention_forward,
)

from carsam.models.tinyvit.configuration import MODEL_TYPE, PATCH_STRIDES, TinyVitConfig, TinyVitSamConfig


def convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, depthwise: bool = False) -> nn.Conv2d:
    """A convolution with the padding that keeps the resolution at stride 1, and a bias (the folded batch norm's)."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=outputs if depthwise else 1)


class TinyVitPatchEmbed(nn.Module):
    """Two convolutions before the first stage: (batch, channels, height, width) → (batch, height', width', width of
    the first stage), with a quarter of the resolution (3 × 3 kernels) or all of it (1 × 1).
    """

    def __init__(self, config: TinyVitConfig):
        super().__init__()
        width, kernel = config.embed_dims[0], config.patch_kernel
        stride = 2 if PATCH_STRIDES[kernel] == 4 else 1
        self.conv1 = convolution(config.num_channels, width // 2, kernel, stride)
        self.act = ACT2FN[config.hidden_act]
        self.conv2 = convolution(width // 2, width, kernel, stride)

    def forward(self, pixel_values: Tensor) -> Tensor:
        # In this memory layout every map of the chain is contiguous with channels last: an eighth less time on CPUs.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return self.conv2(self.act(self.conv1(pixel_values))).permute(0, 2, 3, 1)


class TinyVitMBConv(nn.Module):
    """A block of the first stage: an inverted residual bottleneck (1 × 1, depthwise 3 × 3, 1 × 1), channels last.

    The activation also follows the sum with the input.
    """

    def __init__(self, config: TinyVitConfig, width: int):
        super().__init__()
        hidden = round(width * config.expand_ratio)
        self.conv1 = convolution(width, hidden)
        self.conv2 = convolution(hidden, hidden, 3, depthwise=True)
        self.conv3 = convolution(hidden, width)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, height, width, channels) → the same."""
        maps = hidden_states.permute(0, 3, 1, 2)
        maps = self.act(self.conv1(maps))
        maps = self.act(self.conv2(maps))
        return self.act(self.conv3(maps).permute(0, 2, 3, 1) + hidden_states)


class TinyVitMerge(nn.Module):
    """The step between two stages, channels last."""

    def __init__(self, config: TinyVitConfig, width: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = convolution(width, outputs)
        self.conv2 = convolution(outputs, outputs, 3, stride, depthwise=True)
        self.conv3 = convolution(outputs, outputs)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, height, width, channels) → (batch, height / stride, width / stride, outputs)."""
        maps = hidden_states.permute(0, 3, 1, 2)
        maps = self.act(self.conv1(maps))
        maps = self.act(self.conv2(maps))
        return self.conv3(maps).permute(0, 2, 3, 1)


def bias_positions(window: int, device: torch.device | None = None) -> Tensor:
    """Where a window's attention bias of every pair of tokens lies among the stored ones.

    Pairs with the same distance in rows and in columns share a bias, whatever the direction; the published model
    numbers the distances in the order in which the first token meets them, which is row by row.

    Args:
        window: Side of the window in cells.

    Returns:
        (window², window²) whole numbers in 0..window² - 1: rows apart × window + columns apart.
    """
    cells = torch.arange(window * window, device=device)
    rows, columns = cells // window, cells % window
    return (rows[:, None] - rows).abs() * window + (columns[:, None] - columns).abs()


class TinyVitAttention(nn.Module):
    """Self-attention within windows, with a learned bias for each distance between two tokens.

    The two MatMuls and the softmax are those of the attention function that ``config._attn_implementation`` names
    (transformers' ``ALL_ATTENTION_FUNCTIONS``; eager by default). ``qkv`` gives all queries, then all keys, then all
    values, as in SAM's encoder; the published files interleave them by head.

    Attributes:
        attention_biases: (heads, window²), added to the scaled scores; :func:`bias_positions` says which goes where.
            The positions are computed, not stored: a buffer of them would be one more thing to move, save and check.
    """

    def __init__(self, config: TinyVitConfig, width: int, heads: int, window: int):
        super().__init__()
        self.config = config
        self.num_attention_heads = heads
        self.head_dim = width // heads
        self.window_size = window
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))

    def position_bias(self) -> Tensor:
        """What is added to the scores: (1, heads, tokens, tokens)."""
        return self.attention_biases[:, bias_positions(self.window_size, self.attention_biases.device)][None]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch × windows, tokens, channels) → the same; attention maps are not kept."""
        windows, tokens, width = hidden_states.shape
        qkv = self.qkv(hidden_states).reshape(windows, tokens, 3, self.num_attention_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attention(
            self,
            query,
            key,
            value,
            attention_mask=self.position_bias(),
            dropout=0.0,
            scaling=self.scaling,
            is_causal=self.is_causal,
        )
        return self.proj(output.reshape(windows, tokens, width))


class TinyVitMlp(nn.Module):
    """The feed-forward part of a block; the names are those of SAM's."""

    def __init__(self, config: TinyVitConfig, width: int):
        super().__init__()
        hidden = round(width * config.mlp_ratio)
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.lin2(self.act(self.lin1(hidden_states)))


class TinyVitBlock(nn.Module):
    """A block of the later stages: window attention, a depthwise convolution, an MLP; channels last.

    The map is padded with zeros at its right and bottom to whole windows *before* the norm, so that padded tokens take
    part in the attention as the norm's bias. That is how the published models were trained.
    """

    def __init__(self, config: TinyVitConfig, width: int, heads: int, window: int):
        super().__init__()
        self.window_size = window
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = TinyVitAttention(config, width, heads, window)
        self.local_conv = convolution(width, width, config.local_conv_size, depthwise=True)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = TinyVitMlp(config, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, height, width, channels) → the same."""
        height, width = hidden_states.shape[1:3]
        window = self.window_size
        padded = F.pad(hidden_states, (0, 0, 0, -width % window, 0, -height % window))
        windows = self.attn(partition(self.layer_norm1(padded), window))
        hidden_states = hidden_states + join(windows, window, padded.shape)[:, :height, :width]
        hidden_states = self.local_conv(hidden_states.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


def partition(maps: Tensor, window: int) -> Tensor:
    """Cuts (batch, rows × window, columns × window, channels) into (batch × rows × columns, window², channels)."""
    batch, height, width, channels = maps.shape
    cells = maps.reshape(batch, height // window, window, width // window, window, channels)
    return cells.transpose(2, 3).reshape(-1, window * window, channels)


def join(windows: Tensor, window: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`partition`: windows to a map of ``shape``."""
    batch, height, width, channels = shape
    cells = windows.reshape(batch, height // window, width // window, window, window, channels)
    return cells.transpose(2, 3).reshape(batch, height, width, channels)


class TinyVitEncoder(SamPreTrainedModel):
    """The image encoder.

    Attributes:
        patch_embed: Pixels to the first map.
        layers: Blocks and merges in the order of execution, each a map to a map with channels last.
        neck: SAM's own: a map with channels last to the image embedding with channels first.
        pos_embed: None: TinyViT has none. SAM's encoder has this attribute.
    """

    config_class = TinyVitConfig
    base_model_prefix = "vision_encoder"
    _no_split_modules: ClassVar[list[str]] = ["TinyVitMBConv", "TinyVitBlock"]
    supports_gradient_checkpointing = False

    def __init__(self, config: TinyVitConfig):
        super().__init__(config)
        self.image_size = config.image_size
        self.patch_embed = TinyVitPatchEmbed(config)
        self.pos_embed = None
        layers: list[nn.Module] = []
        for stage, (width, depth) in enumerate(zip(config.embed_dims, config.depths)):
            if stage:
                stride = config.merge_strides[stage - 1]
                layers.append(TinyVitMerge(config, config.embed_dims[stage - 1], width, stride))
            for _ in range(depth):
                if stage:
                    heads, window = config.num_heads[stage - 1], config.window_sizes[stage - 1]
                    layers.append(TinyVitBlock(config, width, heads, window))
                else:
                    layers.append(TinyVitMBConv(config, width))
        self.layers = nn.ModuleList(layers)
        self.neck = SamVisionNeck(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embed

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        _init_biases(module)

    def forward(self, pixel_values: Tensor, **kwargs) -> SamVisionEncoderOutput:
        """Encodes pixels.

        Args:
            pixel_values: (batch, channels, image_size, image_size), normalised.
            **kwargs: What ``SamModel.forward`` hands on; hidden states and attention maps are not recorded.

        Returns:
            The image embedding (batch, output_channels, cells, cells) as ``last_hidden_state``.

        Raises:
            ValueError: The pixels are not of the configuration's size.
        """
        if pixel_values.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"Input image size ({pixel_values.shape[-2]}*{pixel_values.shape[-1]}) doesn't match model "
                f"({self.image_size}*{self.image_size})."
            )
        hidden_states = self.patch_embed(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return SamVisionEncoderOutput(last_hidden_state=self.neck(hidden_states))


class TinyVitSamModel(SamModel):
    """SAM with a TinyViT as its image encoder; used like transformers' ``SamModel``."""

    config_class = TinyVitSamConfig
    _no_split_modules: ClassVar[list[str]] = ["TinyVitMBConv", "TinyVitBlock"]
    supports_gradient_checkpointing = False

    def __init__(self, config: TinyVitSamConfig):
        super(SamModel, self).__init__(config)  # past SamModel's own: it would build a ViT
        self.shared_image_embedding = SamPositionalEmbedding(config.vision_config)
        self.vision_encoder = TinyVitEncoder(config.vision_config)
        self.prompt_encoder = SamPromptEncoder(config)
        # The decoder is no PreTrainedModel, so transformers does not set this for it.
        config.mask_decoder_config._attn_implementation = config._attn_implementation
        self.mask_decoder = SamMaskDecoder(config.mask_decoder_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        _init_biases(module)


def _init_biases(module: nn.Module) -> None:
    if isinstance(module, TinyVitAttention):
        init.zeros_(module.attention_biases)


AutoConfig.register(MODEL_TYPE, TinyVitSamConfig, exist_ok=True)
AutoModel.register(TinyVitSamConfig, TinyVitSamModel, exist_ok=True)
AutoModelForMaskGeneration.register(TinyVitSamConfig, TinyVitSamModel, exist_ok=True)
