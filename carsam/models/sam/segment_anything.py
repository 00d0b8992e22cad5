"""A SAM with the modules, names and signatures of ``segment_anything.modeling.Sam``; see
:func:`carsam.as_segment_anything`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from carsam.data.images.transforms import Geometry, Preprocessor
from carsam.models.sam.forward import decode_prompts, embed_prompts


class PositionEncoding(nn.Module):
    """The prompt encoder's ``pe_layer``: sines and cosines of random directions."""

    def __init__(self, encoding: nn.Module) -> None:
        super().__init__()
        self.encoding = encoding

    @property
    def positional_encoding_gaussian_matrix(self) -> Tensor:
        """``(2, C / 2)``."""
        return self.encoding.positional_embedding

    def _pe_encoding(self, coords: Tensor) -> Tensor:
        return self.encoding(coords)

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Encodings ``(C, h, w)`` of the cells of a grid of size ``(h, w)``."""
        matrix = self.positional_encoding_gaussian_matrix
        # Sums, not (i + 0.5) / side: as transformers and segment-anything compute the centres, to the last bit.
        ones = torch.ones(size, device=matrix.device, dtype=matrix.dtype)
        y, x = ((ones.cumsum(dim) - 0.5) / size[dim] for dim in (0, 1))
        return self.encoding(torch.stack([x, y], dim=-1)).permute(2, 0, 1)

    def forward_with_coords(self, coords_input: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Encodings ``(B, N, C)`` of points ``(B, N, 2)`` as (x, y) in pixels of an image of size ``(h, w)``."""
        scale = torch.tensor([image_size[1], image_size[0]], dtype=torch.float32, device=coords_input.device)
        return self.encoding(coords_input.float() / scale)


class ImageEncoder(nn.Module):
    """``sam.image_encoder``: preprocessed images ``(B, 3, S, S)`` to embeddings ``(B, C, h, w)``."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.vision_encoder = model.vision_encoder
        self.img_size = int(model.config.vision_config.image_size)

    def forward(self, x: Tensor) -> Tensor:
        weight = next(self.parameters())
        return self.vision_encoder(x.to(device=weight.device, dtype=weight.dtype))[0]


class PromptEncoder(nn.Module):
    """``sam.prompt_encoder``: points, boxes and masks to sparse and dense embeddings."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = model.prompt_encoder
        self.pe_layer = PositionEncoding(model.shared_image_embedding)
        grid = int(model.config.prompt_encoder_config.image_embedding_size)
        side = int(model.config.vision_config.image_size)
        self.embed_dim = int(model.config.prompt_encoder_config.hidden_size)
        self.image_embedding_size = (grid, grid)
        self.input_image_size = (side, side)
        self.mask_input_size = (4 * grid, 4 * grid)

    # What segment-anything's ONNX export takes from its prompt encoder. Properties, so that no weight is listed twice.
    @property
    def point_embeddings(self) -> nn.ModuleList:
        """Outside, inside, first corner, second corner."""
        return self.encoder.point_embed

    @property
    def num_point_embeddings(self) -> int:
        """Two labels and two corners."""
        return len(self.encoder.point_embed)

    @property
    def not_a_point_embed(self) -> nn.Embedding:
        """For the label -1."""
        return self.encoder.not_a_point_embed

    @property
    def no_mask_embed(self) -> nn.Embedding:
        """In the place of a mask prompt."""
        return self.encoder.no_mask_embed

    @property
    def mask_downscaling(self) -> nn.Module:
        """Mask prompts to dense embeddings."""
        return self.encoder.mask_embed

    def get_dense_pe(self) -> Tensor:
        """Positional embeddings ``(1, C, h, w)`` of the image's cells."""
        return self.pe_layer(self.image_embedding_size)[None]

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Embeds B prompts.

        Args:
            points: Coordinates ``(B, N, 2)`` in pixels of the input frame, and labels ``(B, N)``.
            boxes: ``(B, 4)`` XYXY in pixels of the input frame.
            masks: ``(B, 1, h, w)`` logits of an earlier prediction.

        Returns:
            Sparse ``(B, T, C)`` and dense ``(B, C, h, w)`` embeddings.
        """
        coords, labels = points if points is not None else (None, None)
        sparse, dense = embed_prompts(self.encoder, coords, labels, boxes, masks)
        # One for all prompts stays one in memory, which also tells the decoder that it is one.
        return sparse, dense if dense.shape[0] > 1 else dense.expand(sparse.shape[0], -1, -1, -1)


class MaskDecoder(nn.Module):
    """``sam.mask_decoder``: embeddings to low-resolution masks and predicted IoU."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.decoder = model.mask_decoder
        self.num_multimask_outputs = int(model.mask_decoder.num_multimask_outputs)
        self.num_mask_tokens = int(model.mask_decoder.num_mask_tokens)
        self.transformer_dim = int(model.config.mask_decoder_config.hidden_size)

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Decodes B prompts of one image, or of B images.

        Returns:
            Logits ``(B, M, h, w)`` and predicted IoU ``(B, M)``, float32; M is 3, or 1 without ``multimask_output``.
        """
        dense = dense_prompt_embeddings
        if dense.shape[0] > 1 and dense.stride(0) == 0:
            dense = dense[:1]
        dtype = self.decoder.iou_token.weight.dtype
        return decode_prompts(
            self.decoder,
            image_embeddings.to(dtype),
            image_pe.to(dtype),
            sparse_prompt_embeddings,
            dense,
            multimask_output,
        )

    def predict_masks(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """All masks of a prompt, the single one first: logits ``(B, 4, h, w)`` and predicted IoU ``(B, 4)``.

        The decoder runs twice, since transformers' own returns either kind.
        """
        prompts = (image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings)
        single, several = (self(*prompts, multimask_output=wanted) for wanted in (False, True))
        masks, iou = (torch.cat(both, dim=1) for both in zip(single, several))
        return masks, iou


class SegmentAnything(nn.Module):
    """What :func:`as_segment_anything` gives; the weights are the model's own, not copies.

    Attributes:
        image_encoder: Images to embeddings; ``img_size`` is the side of the input frame.
        prompt_encoder: Prompts to embeddings.
        mask_decoder: Embeddings to masks.
        mask_threshold: Logit at which masks are cut.
        image_format: ``RGB``.
        pixel_mean: ``(3, 1, 1)``, on the scale 0..255.
        pixel_std: ``(3, 1, 1)``, on the scale 0..255.
    """

    image_format = "RGB"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        # In a tuple, so that its modules are not registered a second time.
        self._model = (model,)
        self._preprocessor = Preprocessor.for_model(model)
        self.image_encoder = ImageEncoder(model)
        self.prompt_encoder = PromptEncoder(model)
        self.mask_decoder = MaskDecoder(model)
        self.mask_threshold = float(getattr(model, "mask_threshold", 0.0))
        for name, values in (("pixel_mean", self._preprocessor.mean), ("pixel_std", self._preprocessor.std)):
            self.register_buffer(name, torch.tensor(values, device=model.device).view(-1, 1, 1), persistent=False)
        self.train(model.training)

    @property
    def sam_model(self) -> PreTrainedModel:
        """The transformers model underneath."""
        return self._model[0]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    def preprocess(self, x: Tensor) -> Tensor:
        """Normalises and pads resized images ``(3, h, w)`` or ``(B, 3, h, w)`` on the scale 0..255 to S × S."""
        if x.ndim == 3:
            return self._preprocessor.normalise(x[None])[0]
        return self._preprocessor.normalise(x)

    def postprocess_masks(self, masks: Tensor, input_size: tuple[int, ...], original_size: tuple[int, ...]) -> Tensor:
        """Logits ``(B, C, h, w)`` of the decoder at the original image's size ``(H, W)``: ``(B, C, H, W)``."""
        (height, width), (input_height, input_width) = original_size, input_size
        geometry = Geometry((int(height), int(width)), (int(input_height), int(input_width)))
        return geometry.masks_to_original(masks, self.image_encoder.img_size)

    @torch.no_grad()
    def forward(self, batched_input: Sequence[Mapping[str, Any]], multimask_output: bool) -> list[dict[str, Tensor]]:
        """Predicts the prompts of several images.

        Args:
            batched_input: For each image ``image`` ``(3, h, w)`` (already resized, on the scale 0..255) and
                ``original_size`` ``(H, W)``; and of the prompts what there is: ``point_coords`` ``(B, N, 2)`` with
                ``point_labels`` ``(B, N)``, ``boxes`` ``(B, 4)``, ``mask_inputs`` ``(B, 1, h, w)``.
            multimask_output: Three masks a prompt instead of one.

        Returns:
            For each image ``masks`` ``(B, C, H, W)`` bool, ``iou_predictions`` ``(B, C)`` and ``low_res_logits``
            ``(B, C, h, w)``.
        """
        if not batched_input:
            return []
        embeddings = self.image_encoder(torch.stack([self.preprocess(entry["image"]) for entry in batched_input]))
        results = []
        for entry, embedding in zip(batched_input, embeddings):
            points = (entry["point_coords"], entry["point_labels"]) if "point_coords" in entry else None
            sparse, dense = self.prompt_encoder(points=points, boxes=entry.get("boxes"), masks=entry.get("mask_inputs"))
            low_res, iou = self.mask_decoder(
                image_embeddings=embedding[None],
                image_pe=self.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask_output,
            )
            logits = self.postprocess_masks(low_res, entry["image"].shape[-2:], entry["original_size"])
            results.append({"masks": logits > self.mask_threshold, "iou_predictions": iou, "low_res_logits": low_res})
        return results
