"""MobileSAM (arXiv 2306.14289) and LiteMedSAM: SAM with a TinyViT (arXiv 2207.10666) as its image encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from carsam.models.attention import MatMulQuantizers
from carsam.models.family import Family, Tensors
from carsam.models.sam.declared import too_large
from carsam.models.sam.encoder import ENCODER, NECK, neck_layers
from carsam.models.sam.family import Sam
from carsam.models.sites import DEPTHWISE, MLP_IN, MLP_OUT, PROJECTION, AttentionSite, LayerSite, Projection
from carsam.models.tinyvit.declared import check_declared
from carsam.models.tinyvit.meta import ANCHOR, tinyvit_from_meta
from carsam.models.tinyvit.modeling import TinyVitBlock, TinyVitSamModel, partition
from carsam.models.tinyvit.names import TinyVitNames

# Of a convolutional block and of a merge; of a block with attention, in execution order.
CONVOLUTIONS = {"conv1": "", "conv2": DEPTHWISE, "conv3": ""}
BLOCK = {
    "attn.qkv": PROJECTION,
    "attn.proj": "",
    "local_conv": DEPTHWISE,
    "mlp.lin1": MLP_IN,
    "mlp.lin2": MLP_OUT,
}


class TinyVit(Sam):
    """SAM's decoder behind another image encoder: convolutions, depthwise ones too, and windows with biases.

    Quantized: every convolution and Linear of the chain and of the neck, and both MatMuls of each attention, its biases
    added to the scores in floating point. The patch embedding stays in floating point, as SAM's does.
    """

    name = "tinyvit"
    names = TinyVitNames()
    onnx_files = ()

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return TinyVitSamModel

    def encoder_paths(self, model: nn.Module) -> tuple[str, ...]:
        return (*_layers(model), NECK)

    def encoder_attentions(self, model: nn.Module) -> list[AttentionSite]:
        sites = []
        for path, module in _layers(model).items():
            if isinstance(module, TinyVitBlock):
                name = f"{path}.attn"
                projections = (Projection(f"{name}.qkv", part, 3) for part in range(3))
                sites.append(AttentionSite(name, *projections, output=f"{name}.proj"))
        return sites

    def encoder_layers(self, model: nn.Module) -> list[LayerSite]:
        layers = []
        for path, module in _layers(model).items():
            parts = BLOCK if isinstance(module, TinyVitBlock) else CONVOLUTIONS
            layers += [LayerSite(f"{path}.{part}", role) for part, role in parts.items()]
        return [*layers, *neck_layers()]

    def floating_layers(self) -> tuple[str, ...]:
        return (f"{ENCODER}.patch_embed.conv1", f"{ENCODER}.patch_embed.conv2")

    def readers(self, model: nn.Module) -> tuple[tuple[str, str], ...]:
        pairs = (("layer_norm1", "attn.qkv"), ("layer_norm2", "mlp.lin1"))
        blocks = [path for path, module in _layers(model).items() if isinstance(module, TinyVitBlock)]
        return tuple((f"{block}.{norm}", f"{block}.{layer}") for block in blocks for norm, layer in pairs)

    def padded(self, model: nn.Module) -> tuple[str, ...]:
        return ()  # maps are padded before the norm, so that padded tokens are the norm's bias like any token

    def residual(self, model: nn.Module) -> str:
        return "depthwise convolutions in every block read its channels one by one"

    def with_matmul(self, attention: nn.Module, matmul: MatMulQuantizers) -> nn.Module:
        # All of its attentions call the registered function, with their biases as the mask.
        return Family.with_matmul(self, attention, matmul)

    def valid_queries(self, stage: nn.Module, inputs: Tensors) -> Tensor | None:
        if not isinstance(stage, TinyVitBlock):
            return None
        side, (height, width) = stage.window_size, inputs["hidden_states"].shape[1:3]
        inside = F.pad(torch.ones(1, height, width, 1), (0, 0, 0, -width % side, 0, -height % side))
        return partition(inside, side)[..., 0] > 0

    @property
    def anchor(self) -> str:
        return f"{ENCODER}.patch_embed.conv1.weight"

    @property
    def published_anchor(self) -> str:
        return ANCHOR

    def from_state(self, state: Mapping[str, Tensor], source: str, image_size: int | None = None) -> PreTrainedModel:
        return tinyvit_from_meta(state, source, image_size)

    def check_declared(
        self, config: Mapping[str, Any], shapes: Mapping[str, Any], source: str, *, weights_per_element: float = 1
    ) -> None:
        check_declared(config, shapes, source, weights_per_element=weights_per_element)

    def too_large(self, config: PreTrainedConfig, layers: Sequence[str]) -> str:
        encoder = config.vision_config
        widths = [*encoder.embed_dims, *encoder.window_sizes, round(max(encoder.embed_dims) * encoder.mlp_ratio)]
        if max(widths) > 2**15:
            return f"a width or window of its encoder is {max(widths)}, but no model has more than {2**15}"
        return too_large(config, layers, vision=())

    def foreign(self, content: object) -> str | None:
        return None  # SAM's answer covers what is neither

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        vision = model.config.vision_config
        names = ("image_size", "patch_kernel", "depths", "num_heads", "window_sizes", "merge_strides")
        return {name: getattr(vision, name) for name in names}


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks and merges by module path, in execution order."""
    layers = model.get_submodule(f"{ENCODER}.layers")
    return {f"{ENCODER}.layers.{index}": layer for index, layer in enumerate(layers)}
