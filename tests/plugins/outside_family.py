"""A package from outside: a family of models, a tiny convolutional image encoder before SAM's decoder.

Tests copy this file into a folder of its own and announce it there (see ``test_family_plugin.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, SamConfig, SamModel
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import (
    SamMaskDecoder,
    SamPositionalEmbedding,
    SamPreTrainedModel,
    SamPromptEncoder,
    SamVisionEncoderOutput,
    SamVisionNeck,
)

from carsam.models.attention import MatMulQuantizers
from carsam.models.family import Family, Tensors
from carsam.models.sam.declared import DECODER, PROMPT, VISION, check_parts, check_size
from carsam.models.sam.encoder import neck_layers
from carsam.models.sam.family import Sam
from carsam.models.sam.names import SamNames
from carsam.models.sites import AttentionSite, LayerSite
from carsam.models.skeleton import skeleton


@strict
class ToySamConfig(SamConfig):
    """SAM's own settings; of the image encoder's, width, depth and patches count."""

    model_type: ClassVar[str] = "toy_sam"


class Patches(nn.Conv2d):
    """Pixels to a map with channels last."""

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels).permute(0, 2, 3, 1)


class ToyBlock(nn.Module):
    """A convolution with a shortcut, channels last."""

    def __init__(self, width: int):
        super().__init__()
        self.mixing = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        mixed = self.mixing(hidden_states.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return hidden_states + nn.functional.gelu(mixed)


class ToyEncoder(SamPreTrainedModel):
    """Patches, blocks, SAM's neck."""

    config_class = SamVisionConfig

    def __init__(self, config: SamVisionConfig):
        super().__init__(config)
        self.patch_embed = Patches(3, config.hidden_size, config.patch_size, config.patch_size)
        self.pos_embed = None
        self.layers = nn.ModuleList(ToyBlock(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.neck = SamVisionNeck(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> SamVisionEncoderOutput:
        hidden_states = self.patch_embed(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return SamVisionEncoderOutput(last_hidden_state=self.neck(hidden_states))


class ToySamModel(SamModel):
    """SAM's decoder behind the encoder above."""

    config_class = ToySamConfig

    def __init__(self, config: ToySamConfig):
        super(SamModel, self).__init__(config)
        self.shared_image_embedding = SamPositionalEmbedding(config.vision_config)
        self.vision_encoder = ToyEncoder(config.vision_config)
        self.prompt_encoder = SamPromptEncoder(config)
        config.mask_decoder_config._attn_implementation = config._attn_implementation
        self.mask_decoder = SamMaskDecoder(config.mask_decoder_config)
        self.post_init()


AutoConfig.register("toy_sam", ToySamConfig)
AutoModel.register(ToySamConfig, ToySamModel)


class ToyNames(SamNames):
    """The encoder's convolution by name."""

    family = "toy"
    title = "Toy SAM"
    model_types = ("toy_sam",)
    model_class = "ToySamModel"
    library = "toy_family"
    regions: ClassVar[Mapping[str, str]] = {**SamNames.regions, "vision_encoder.": "toy blocks"}


class Toy(Sam):
    """All in which it differs from SAM."""

    name = "toy"
    names = ToyNames()

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return ToySamModel

    def encoder_attentions(self, model: nn.Module) -> list[AttentionSite]:
        return []

    def encoder_layers(self, model: nn.Module) -> list[LayerSite]:
        return [*(LayerSite(f"{block}.mixing") for block in self.encoder_paths(model)[:-1]), *neck_layers()]

    def readers(self, model: nn.Module) -> tuple[tuple[str, str], ...]:
        return ()

    def with_matmul(self, attention: nn.Module, matmul: MatMulQuantizers) -> nn.Module:
        return Family.with_matmul(self, attention, matmul)

    def valid_queries(self, stage: nn.Module, inputs: Tensors) -> Tensor | None:
        return None

    @property
    def anchor(self) -> str:
        return "vision_encoder.patch_embed.weight"

    @property
    def published_anchor(self) -> str:
        return "toy_encoder.patches.weight"

    def from_state(self, state: Mapping[str, Tensor], source: str, image_size: int | None = None) -> PreTrainedModel:
        raise NotImplementedError("nobody published one")

    def check_declared(
        self, config: Mapping[str, Any], shapes: Mapping[str, Any], source: str, *, weights_per_element: float = 1
    ) -> None:
        check_parts(ToySamConfig, {**config, VISION: None}, shapes, source, (PROMPT, DECODER))
        full = ToySamConfig.from_dict(dict(config))
        check_size(ToySamModel, full, shapes, f"config.json of {source}", weights_per_element)

    def foreign(self, content: object) -> str | None:
        return None

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        return {"image_size": model.config.vision_config.image_size}


def small_model() -> ToySamModel:
    """One with random weights, for the contract of families."""
    vision = {"hidden_size": 24, "num_hidden_layers": 3, "image_size": 128, "patch_size": 16}
    config = ToySamConfig(vision_config=vision, prompt_encoder_config={"image_size": 128, "patch_size": 16})
    model = skeleton(ToySamModel, config).to_empty(device="cpu")
    model.tie_weights()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        model.shared_image_embedding.positional_embedding.normal_()
    return model.eval().requires_grad_(False)
