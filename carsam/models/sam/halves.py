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
        self.side = int(model.config.vision_config.image_size)

    def forward(
        self, image_embeddings: Tensor, points: Tensor, labels: Tensor, mask: Tensor, has_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As :class:`carsam.models.family.Halves` says of a decoder."""
        sparse = self.embed_points(points, labels)
        dense = self.embed_mask(mask, has_mask)
        return self.decode(image_embeddings, sparse, dense)

    def embed_points(self, points: Tensor, labels: Tensor) -> Tensor:
        """Points (B, N, 2) with labels (B, N) to tokens (B, N, C)."""
        encoder = self.model.prompt_encoder
        # (x, y) of a pixel's centre as a share of the square frame.
        tokens = self.model.shared_image_embedding((points + 0.5) / float(self.side))
        labels = labels[..., None]
        tokens = tokens * (labels >= 0).to(tokens.dtype)
        tokens = tokens + encoder.not_a_point_embed.weight * (labels == -1).to(tokens.dtype)
        for index, embedding in enumerate(encoder.point_embed):
            tokens = tokens + embedding.weight * (labels == index).to(tokens.dtype)
        return tokens

    def embed_mask(self, mask: Tensor, has_mask: Tensor) -> Tensor:
        """Mask logits (1 or B, 1, h, w), or the embedding of none, to (1 or B, C, h', w')."""
        encoder = self.model.prompt_encoder
        # Some tools pass -1 for "none".
        has_mask = has_mask.clamp(0, 1).reshape(-1, 1, 1, 1)
        none = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        return has_mask * encoder.mask_embed(mask) + (1 - has_mask) * none

    def decode(self, image_embeddings: Tensor, sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """As the model's ``mask_decoder``, which gives either the single mask or the others: here it is all of them.

        Args:
            image_embeddings: (1, C, h, w).
            sparse: (B, N, C).
            dense: (1 or B, C, h, w).

        Returns:
            Logits (B, M, 4h, 4w) and predicted IoU (B, M).
        """
        decoder = self.model.mask_decoder
        count = sparse.shape[0]
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])[None].expand(count, -1, -1)
        tokens = torch.cat([tokens, sparse], dim=1)[:, None]
        images = (image_embeddings + dense).expand(count, -1, -1, -1)
        queries, keys = decoder.transformer(
            point_embeddings=tokens,
            image_embeddings=images,
            image_positional_embeddings=self.model.get_image_wide_positional_embeddings(),
            attention_similarity=None,
        )
        queries = queries[:, 0]
        maps = keys[:, 0].transpose(1, 2).reshape(count, -1, *image_embeddings.shape[-2:])
        maps = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(maps)))
        maps = decoder.activation(decoder.upscale_conv2(maps))
        several = decoder.num_mask_tokens
        heads = [mlp(queries[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
        height, width = maps.shape[-2:]
        logits = torch.stack(heads, dim=1) @ maps.flatten(2)
        return logits.reshape(count, several, height, width), decoder.iou_prediction_head(queries[:, 0])
