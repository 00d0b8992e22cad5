"""SAM 2 on images as two modules of tensors alone, as ONNX files have them."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from carsam.models.sam.halves import SamDecoder
from carsam.models.sam2.encoder import narrow

# In the order of samexporter's files, which X-AnyLabeling reads too.
NAMES = ("high_res_feats_0", "high_res_feats_1", "image_embed")


class Sam2Encoder(nn.Module):
    """Preprocessed pixels (1, 3, S, S) to the finest map, the next one and the embedding, as :data:`NAMES`.

    The embedding of "no memory" is added, as it is in every such file: they are of images.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        maps = self.model.vision_encoder(pixel_values, return_dict=True).fpn_hidden_states
        finest, fine, embedding = narrow(self.model, maps[::-1])
        return finest, fine, embedding + self.model.no_memory_embedding.view(1, -1, 1, 1)


class Sam2Decoder(SamDecoder):
    """The three tensors of an image and prompts to all masks; see :class:`SamDecoder`."""

    def forward(
        self,
        high_res_feats_0: Tensor,
        high_res_feats_1: Tensor,
        image_embed: Tensor,
        points: Tensor,
        labels: Tensor,
        mask: Tensor,
        has_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As :class:`carsam.models.family.Halves` says of a decoder."""
        decoder = self.model.mask_decoder
        sparse, dense = self.embed_points(points, labels), self.embed_mask(mask, has_mask)
        own = [decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight]
        queries, maps = self.transform(image_embed, own, sparse, dense)
        maps = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(maps) + high_res_feats_1))
        maps = decoder.activation(decoder.upscale_conv2(maps) + high_res_feats_0)
        return self.masks(queries[:, 2:], maps), decoder.iou_prediction_head(queries[:, 1])

    @property
    def side(self) -> int:
        return int(self.model.prompt_encoder.input_image_size)

    def embedding_of(self, label: int) -> Tensor:
        return self.model.prompt_encoder.point_embed.weight[label]
