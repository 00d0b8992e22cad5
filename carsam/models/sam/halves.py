"""SAM as two modules of tensors alone, as ONNX files have them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class SamEncoder(nn.Module):
    """Preprocessed pixels (1, 3, S, S) to image embeddings (1, C, h, w)."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return (self.model.vision_encoder(pixel_values).last_hidden_state,)


class SamDecoder(nn.Module):
    """Image embeddings and prompts to all masks.

    Prompts lie in the first dimension, and every kind of point has a label, as in segment-anything's ONNX model
    (``SamOnnxModel``); a batch of prompts for one image is this project's addition.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    @property
    def side(self) -> int:
        """Side of the input frame in pixels."""
        return int(self.model.config.vision_config.image_size)

    def embedding_of(self, label: int) -> Tensor:
        """What is added to a point of a label: 0 and 1, or 2 and 3 for the corners of a box."""
        return self.model.prompt_encoder.point_embed[label].weight

    def forward(
        self, image_embeddings: Tensor, points: Tensor, labels: Tensor, mask: Tensor, has_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As :class:`carsam.models.family.Halves` says of a decoder."""
        decoder = self.model.mask_decoder
        sparse, dense = self.embed_points(points, labels), self.embed_mask(mask, has_mask)
        queries, maps = self.transform(
            image_embeddings, [decoder.iou_token.weight, decoder.mask_tokens.weight], sparse, dense
        )
        maps = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(maps)))
        maps = decoder.activation(decoder.upscale_conv2(maps))
        return self.masks(queries[:, 1:], maps), decoder.iou_prediction_head(queries[:, 0])

    def embed_points(self, points: Tensor, labels: Tensor) -> Tensor:
        """Points (B, N, 2) with labels (B, N) to tokens (B, N, C)."""
        encoder = self.model.prompt_encoder
        # (x, y) of a pixel's centre as a share of the square frame.
        tokens = self.model.shared_image_embedding((points + 0.5) / float(self.side))
        labels = labels[..., None]
        tokens = tokens * (labels >= 0).to(tokens.dtype)
        tokens = tokens + encoder.not_a_point_embed.weight * (labels == -1).to(tokens.dtype)
        for label in range(4):
            tokens = tokens + self.embedding_of(label) * (labels == label).to(tokens.dtype)
        return tokens

    def embed_mask(self, mask: Tensor, has_mask: Tensor) -> Tensor:
        """Mask logits (1 or B, 1, h, w), or the embedding of none, to (1 or B, C, h', w')."""
        encoder = self.model.prompt_encoder
        # Some tools pass -1 for "none".
        has_mask = has_mask.clamp(0, 1).reshape(-1, 1, 1, 1)
        none = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        return has_mask * encoder.mask_embed(mask) + (1 - has_mask) * none

    def transform(
        self, image_embeddings: Tensor, own: list[Tensor], sparse: Tensor, dense: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs the two-way transformer.

        The model's own ``mask_decoder`` gives either the single mask or the others, where a file gives all of them; so
        what it does around the transformer is written out here.

        Args:
            image_embeddings: (1, C, h, w).
            own: The decoder's own tokens (n, C), in its order.
            sparse: (B, N, C).
            dense: (1 or B, C, h, w).

        Returns:
            Tokens (B, n + N, C) and maps (B, C, h, w).
        """
        count = sparse.shape[0]
        tokens = torch.cat([torch.cat(own)[None].expand(count, -1, -1), sparse], dim=1)[:, None]
        queries, keys = self.model.mask_decoder.transformer(
            point_embeddings=tokens,
            image_embeddings=(image_embeddings + dense).expand(count, -1, -1, -1),
            image_positional_embeddings=self.model.get_image_wide_positional_embeddings(),
            attention_similarity=None,
        )
        maps = keys[:, 0].transpose(1, 2).reshape(count, -1, *image_embeddings.shape[-2:])
        return queries[:, 0], maps

    def masks(self, tokens: Tensor, maps: Tensor) -> Tensor:
        """Logits (B, M, 4h, 4w) of all masks from their tokens (B, M and more, C) and the upscaled maps."""
        heads = [mlp(tokens[:, i]) for i, mlp in enumerate(self.model.mask_decoder.output_hypernetworks_mlps)]
        logits = torch.stack(heads, dim=1) @ maps.flatten(2)
        return logits.reshape(maps.shape[0], len(heads), *maps.shape[-2:])
