"""SAM 2 and SAM 2.1 (arXiv 2408.00714) on images: Hiera with a feature pyramid, and SAM's decoder with more to read.

What is quantized: every Linear of Hiera's blocks, those that change the width among them, and both MatMuls of each
attention (queries after pooling); the convolutions of the neck; the two-way transformer of the decoder, as SAM's.

What stays in floating point, as in AHCQ-SAM (docs/METHOD.md): the patch embedding, which reads pixels; the prompt
encoder; and all that turns tokens into masks, scores and object scores, with the two convolutions that narrow the
high-resolution maps for it (``conv_s0``, ``conv_s1``). ``Sites.floating`` names them, and
``benchmarks/floating_parts.py`` measures what quantizing each would cost.

Where a video's memory joins in: :func:`carsam.models.sam2.encoder.unfold` of an embedding gives what memory attention
reads (the last map, without the embedding of "no memory") and the two maps that only the decoder reads;
:func:`carsam.models.sam2.forward.predict_logits` is the decoder without memory. A family with memory derives from this
one (``models/sam2_video``) and puts its parts between ``encoder`` and ``decoder``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Sam2Model

from carsam.errors import CheckpointError
from carsam.models.attention import MatMulQuantizers
from carsam.models.family import ENCODED, ENCODER, Family, Halves, Stage, Tensors
from carsam.models.sam.decoder import TwoWayBlock
from carsam.models.sam.family import Sam
from carsam.models.sam2 import declared, encoder, forward, meta
from carsam.models.sam2.halves import NAMES, Sam2Decoder, Sam2Encoder
from carsam.models.sam2.names import Sam2Names
from carsam.models.sites import AttentionSite, LayerSite, Sites
from carsam.reconstruct.units import Unit

if TYPE_CHECKING:
    from carsam.prompts.calibration import CalibrationImage


class Sam2(Sam):
    """transformers' ``Sam2Model``, and Meta's checkpoints."""

    name = "sam2"
    names = Sam2Names()
    onnx_files = ()
    stretched = True

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return Sam2Model

    # Image encoder.

    def encoder_attentions(self, model: nn.Module) -> list[AttentionSite]:
        return encoder.encoder_attentions(model)

    def encoder_layers(self, model: nn.Module) -> list[LayerSite]:
        return encoder.encoder_layers(model)

    def floating_layers(self) -> tuple[str, ...]:
        narrowing = ("mask_decoder.conv_s0", "mask_decoder.conv_s1")
        return (f"{encoder.BACKBONE}.patch_embed.projection", *narrowing)

    def readers(self, model: nn.Module) -> tuple[tuple[str, str], ...]:
        return encoder.readers(model)

    def padded(self, model: nn.Module) -> tuple[str, ...]:
        return encoder.padded(model)

    def residual(self, model: nn.Module) -> str:
        return "its shortcut takes maxima channel by channel where its width changes"

    def encoder_paths(self, model: nn.Module) -> tuple[str, ...]:
        return (*encoder.blocks(model), encoder.NECK)

    def encoder_stages(self, sites: Sites) -> tuple[Stage, ...]:
        return encoder.stages(sites.encoder_stages) if sites.encoder_stages else ()

    def enter_encoder(self, model: nn.Module, before: Tensors, image: CalibrationImage) -> Tensors:
        return encoder.enter_encoder(model, before, image)

    def with_matmul(self, attention: nn.Module, matmul: MatMulQuantizers) -> nn.Module:
        # All of its attentions call the registered function.
        return Family.with_matmul(self, attention, matmul)

    def adapt(self, model: nn.Module) -> None:
        encoder.adapt_neck(model)

    def valid_queries(self, stage: nn.Module, inputs: Tensors) -> Tensor | None:
        hidden = inputs.get(ENCODED)
        return None if hidden is None else encoder.valid_queries(stage, *hidden.shape[1:3])

    # Decoder.

    def block(self, name: str) -> TwoWayBlock:
        return TwoWayBlock(name, output="o_proj", mlp_layers=("proj_in", "proj_out"))

    def decoder_input(self, model: nn.Module, embedding: Tensor, boxes: Tensor) -> Tensors:
        return forward.decoder_input(model, embedding, boxes)

    # The whole model.

    def units(self, sites: Sites, part: str, granularity: str = "module") -> list[Unit]:
        if part == ENCODER:
            stages = self.encoder_stages(sites)
            return encoder.stage_units(stages) if stages else []
        return super().units(sites, part, granularity)

    def image_size(self, model: nn.Module) -> int:
        return int(model.prompt_encoder.input_image_size)

    def low_res_size(self, model: nn.Module) -> int:
        return forward.mask_side(model)

    def encode_image(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        return forward.encode_image(model, pixel_values)

    def embedding_module(self, model: nn.Module) -> nn.Module:
        return encoder.ImageEncoder(model)

    def predict_logits(self, model: nn.Module, image_embeddings: Tensor, **prompts: Any) -> tuple[Tensor, Tensor]:
        return forward.predict_logits(model, image_embeddings, **prompts)

    box_ends_in_no_point = True

    def chosen_masks(
        self, model: nn.Module, logits: Tensor, iou: Tensor, multimask_output: bool
    ) -> tuple[Tensor, Tensor]:
        decoder = model.mask_decoder
        applies = decoder.dynamic_multimask_via_stability and not decoder.training
        if multimask_output or not applies or not len(logits):
            return super().chosen_masks(model, logits, iou, multimask_output)
        # As transformers' decoder ends: a single mask that is not stable gives way to the best of the others.
        masks, scores = decoder._dynamic_multimask_via_stability(logits[None], iou[None])
        return masks[0], scores[0]

    def halves(self, model: nn.Module) -> Halves:
        return Halves(Sam2Encoder(model), Sam2Decoder(model), NAMES)

    def decode(self, model: nn.Module, encoded: Tensors, image: CalibrationImage) -> tuple[Tensor, Tensor] | None:
        embedding = encoded[ENCODED]
        return forward.decode(model, embedding, image.boxes.to(embedding.device))

    def forward(self, model: nn.Module, image: CalibrationImage) -> None:
        with torch.no_grad():
            embedding = forward.encode_image(model, image.pixel_values)
            forward.predict_logits(model, embedding, boxes=image.boxes.to(embedding.device))

    def as_segment_anything(self, model: nn.Module) -> nn.Module:
        raise CheckpointError(
            "a SAM 2 has no segment_anything form: its decoder reads three maps of the image, not one. Use "
            "carsam.SamPredictor, whose interface is that of both packages' predictors."
        )

    # Checkpoints.

    @property
    def anchor(self) -> str:
        return f"{encoder.BACKBONE}.patch_embed.projection.weight"

    @property
    def published_anchor(self) -> str:
        return meta.ANCHOR

    @property
    def untouched(self) -> tuple[str, ...]:
        return ("mask_decoder.mask_tokens.weight", "mask_decoder.obj_score_token.weight", "no_memory_embedding")

    def from_state(self, state: Mapping[str, Tensor], source: str, image_size: int | None = None) -> PreTrainedModel:
        return meta.sam2_from_meta(state, source, image_size)

    def check_declared(
        self, config: Mapping[str, Any], shapes: Mapping[str, Any], source: str, *, weights_per_element: float = 1
    ) -> None:
        declared.check_declared(self.model_class, config, shapes, source, weights_per_element=weights_per_element)

    def too_large(self, config: PreTrainedConfig, layers: Sequence[str]) -> str:
        return declared.too_large(config, layers)

    def foreign(self, content: object) -> str | None:
        return None  # SAM's answer covers what is neither

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        backbone = model.config.vision_config.backbone_config
        names = ("blocks_per_stage", "num_attention_heads_per_stage", "window_size_per_stage", "query_stride")
        found = {name: list(getattr(backbone, name)) for name in (*names, "global_attention_blocks")}
        return {"image_size": self.image_size(model), **found}
