"""SAM (arXiv 2304.02643): a ViT over the image, a prompt encoder, and the two-way mask decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, SamModel
from transformers.models.sam.modeling_sam import SamVisionAttention

from carsam.errors import CheckpointError
from carsam.models.attention import MatMulQuantizers
from carsam.models.family import ENCODED, ENCODER, Family, Halves, Part, Stage, Tensors
from carsam.models.folder import check_image_size
from carsam.models.sam import decoder, encoder, forward, meta
from carsam.models.sam.attention import QuantizedVisionAttention
from carsam.models.sam.declared import check_declared, too_large
from carsam.models.sam.halves import SamDecoder, SamEncoder
from carsam.models.sam.names import SamNames
from carsam.models.sites import AttentionSite, LayerSite, ResidualStream, Sites
from carsam.reconstruct.units import Unit

if TYPE_CHECKING:
    from carsam.prompts.calibration import CalibrationImage


class Sam(Family):
    """transformers' ``SamModel`` and Meta's checkpoints of it.

    Families with another image encoder before the same decoder derive from this one and override what says
    ``image encoder``.
    """

    name = "sam"
    names = SamNames()
    onnx_files = ("vision_encoder", "prompt_encoder_mask_decoder")

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return SamModel

    # Image encoder.

    def encoder_attentions(self, model: nn.Module) -> list[AttentionSite]:
        """Attentions of the image encoder, in execution order."""
        return encoder.encoder_attentions(model)

    def encoder_layers(self, model: nn.Module) -> list[LayerSite]:
        """Quantized layers of the image encoder, in execution order."""
        return encoder.encoder_layers(model)

    def floating_layers(self) -> tuple[str, ...]:
        """Layers of the image encoder that stay in floating point: the patch embedding, which reads pixels."""
        return (f"{encoder.ENCODER}.patch_embed.projection",)

    def readers(self, model: nn.Module) -> tuple[tuple[str, str], ...]:
        """Norms of the image encoder with the layers that read them."""
        return encoder.readers(model)

    def padded(self, model: nn.Module) -> tuple[str, ...]:
        """Those layers that also read zeros, padded in after the norm of the image encoder."""
        return encoder.padded(model)

    def residual(self, model: nn.Module) -> ResidualStream | str:
        """The stream through the image encoder's blocks, or why it may not be turned."""
        return encoder.residual(model)

    def encoder_paths(self, model: nn.Module) -> tuple[str, ...]:
        """Module paths of the image encoder's stages, in execution order."""
        return (*encoder.blocks(model), encoder.NECK)

    def encoder_stages(self, sites: Sites) -> tuple[Stage, ...]:
        """Stages of the image encoder."""
        return tuple(encoder.chain(path) for path in sites.encoder_stages)

    def enter_encoder(self, model: nn.Module, before: Tensors, image: CalibrationImage) -> Tensors:
        """Input of the image encoder's first stage."""
        return encoder.enter_encoder(model, before, image)

    def with_matmul(self, attention: nn.Module, matmul: MatMulQuantizers) -> nn.Module:
        if isinstance(attention, SamVisionAttention):
            return QuantizedVisionAttention(attention, matmul)
        return super().with_matmul(attention, matmul)

    def compute_in_pieces(self, model: nn.Module) -> None:
        encoder.attend_in_pieces(model)

    def integer_module(self, module: nn.Module) -> nn.Module | None:
        from carsam.models.sam.integers import integer_module  # needs the runtime, which few models are used with

        return integer_module(module)

    def valid_queries(self, stage: nn.Module, inputs: Tensors) -> Tensor | None:
        return encoder.valid_queries(stage, *inputs["hidden_states"].shape[1:3])

    # Decoder.

    def block(self, name: str) -> decoder.TwoWayBlock:
        """A block of the decoder by its module path."""
        return decoder.TwoWayBlock(name)

    def decoder_input(self, model: nn.Module, embedding: Tensor, boxes: Tensor) -> Tensors:
        """Arguments of the decoder's transformer; see :func:`carsam.models.sam.decoder.decoder_input`."""
        return decoder.decoder_input(model, embedding, boxes)

    def _blocks(self, sites: Sites) -> tuple[decoder.TwoWayBlock, ...]:
        """The decoder's blocks: all of its stages but the last, the final attention."""
        return tuple(self.block(name) for name in sites.decoder_stages[:-1])

    # The whole model.

    def sites(self, model: nn.Module) -> Sites:
        blocks = decoder.two_way_blocks(model, self.block)
        attentions = [*self.encoder_attentions(model), *decoder.decoder_attentions(blocks)]
        layers = [*self.encoder_layers(model), *decoder.decoder_layers(blocks)]
        modules = dict(model.named_modules())
        missing = [site.name for site in (*layers, *attentions) if site.name not in modules]
        if missing or not layers:
            raise CheckpointError(
                f"this {type(model).__name__} has no module {missing[:3]}; its layout is not one that carsam knows."
            )
        return Sites(
            family=self,
            layers=tuple(layers),
            attentions=tuple(attentions),
            encoder_stages=self.encoder_paths(model),
            decoder_stages=(*(block.name for block in blocks), decoder.FINAL),
            decoder=decoder.TRANSFORMER,
            readers=self.readers(model),
            padded=self.padded(model),
            residual=self.residual(model),
            moments=decoder.moments(blocks),
            neighbours=decoder.neighbours(blocks),
            focus=decoder.focus(blocks),
            floating=tuple(LayerSite(path) for path in (*self.floating_layers(), *decoder.heads(model))),
        )

    def parts(self, sites: Sites, granularity: str = "module") -> tuple[Part, ...]:
        blocks = self._blocks(sites)
        return (
            Part("encoder", self.enter_encoder, self.encoder_stages(sites)),
            Part(
                "decoder",
                decoder.enter_decoder(blocks, granularity, self.decoder_input),
                decoder.decoder_stages(blocks, granularity),
            ),
        )

    def units(self, sites: Sites, part: str, granularity: str = "module") -> list[Unit]:
        if part == ENCODER:
            return encoder.stage_units(self.encoder_stages(sites))
        return decoder.decoder_units(self._blocks(sites), granularity)

    def image_size(self, model: nn.Module) -> int:
        return int(model.config.vision_config.image_size)

    def low_res_size(self, model: nn.Module) -> int:
        return 4 * int(model.config.prompt_encoder_config.image_embedding_size)

    def encode_image(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        return forward.encode_image(model, pixel_values)

    def embedding_module(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(encoder.ENCODER)

    def predict_logits(self, model: nn.Module, image_embeddings: Tensor, **prompts: Any) -> tuple[Tensor, Tensor]:
        return forward.predict_logits(model, image_embeddings, **prompts)

    def decode(self, model: nn.Module, encoded: Tensors, image: CalibrationImage) -> tuple[Tensor, Tensor] | None:
        embedding = encoded[ENCODED]
        with torch.no_grad():
            sparse, dense = forward.embed_prompts(model.prompt_encoder, boxes=image.boxes.to(embedding.device))
            positions = model.get_image_wide_positional_embeddings()
        # An embedding for each prompt: with one for all, prompts would lie in another dimension than in the stages.
        embeddings = embedding.expand(len(sparse), -1, -1, -1)
        return forward.decode_prompts(model.mask_decoder, embeddings, positions, sparse, dense, multimask_output=False)

    def halves(self, model: nn.Module) -> Halves:
        return Halves(SamEncoder(model), SamDecoder(model), ("image_embeddings",))

    def forward(self, model: nn.Module, image: CalibrationImage) -> None:
        with torch.no_grad():
            model(**image.inputs(model.device))

    def as_segment_anything(self, model: nn.Module) -> nn.Module:
        from carsam.models.sam.segment_anything import SegmentAnything  # reads images, whose room asks for families

        return SegmentAnything(model)

    # Checkpoints.

    @property
    def anchor(self) -> str:
        return "vision_encoder.patch_embed.projection.weight"

    @property
    def published_anchor(self) -> str:
        return meta.ANCHOR

    @property
    def untouched(self) -> tuple[str, ...]:
        return (
            "mask_decoder.mask_tokens.weight",
            "mask_decoder.iou_token.weight",
            "prompt_encoder.point_embed.2.weight",
        )

    def from_state(self, state: Mapping[str, Tensor], source: str, image_size: int | None = None) -> PreTrainedModel:
        model = meta.sam_from_meta(state, source)
        check_image_size(self, model, source, image_size)
        return model

    def check_declared(
        self, config: Mapping[str, Any], shapes: Mapping[str, Any], source: str, *, weights_per_element: float = 1
    ) -> None:
        check_declared(config, shapes, source, weights_per_element=weights_per_element)

    def too_large(self, config: PreTrainedConfig, layers: Sequence[str]) -> str:
        return too_large(config, layers)

    def foreign(self, content: object) -> str | None:
        return meta.why_not_sam(content)

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        vision = model.config.vision_config
        found = {key: getattr(vision, key) for key in ("image_size", "patch_size", "window_size")}
        return {
            **found,
            "num_attention_heads": vision.num_attention_heads,
            "global_attn_indexes": list(vision.global_attn_indexes),
        }
