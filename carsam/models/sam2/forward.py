"""A SAM 2 in two halves: an image becomes embeddings, and prompts with embeddings become masks.

As ``sam2.SAM2ImagePredictor`` does: no memory, and its embedding is added to the image's. Without a point or box the
decoder gets no prompt token; transformers' ``Sam2Model.forward`` gives it one that stands for no point.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from carsam.models.family import Tensors
from carsam.models.prompts import check_prompts
from carsam.models.sam.decoder import transformer_arguments
from carsam.models.sam.forward import embed_prompts
from carsam.models.sam2.encoder import fold, narrow, unfold


@torch.no_grad()
def encode_image(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """Embeddings ``(B, 4 C, h, w)`` of preprocessed images ``(B, 3, S, S)``, the finer maps folded in."""
    pixels = pixel_values.to(device=model.device, dtype=model.dtype)
    # From the finest level to the coarsest that is used, as transformers orders them.
    maps = model.vision_encoder(pixels, return_dict=True).fpn_hidden_states
    return fold(narrow(model, maps[::-1]))


@torch.no_grad()
def predict_logits(
    model: PreTrainedModel,
    image_embeddings: Tensor,
    *,
    points: Tensor | None = None,
    labels: Tensor | None = None,
    boxes: Tensor | None = None,
    masks: Tensor | None = None,
    multimask_output: bool = False,
) -> tuple[Tensor, Tensor]:
    """Decodes B prompts of one image; arguments and results as :func:`carsam.models.sam.forward.predict_logits`.

    Without ``multimask_output``, a mask that is not stable gives way to the best of the three others, where the model's
    configuration says so (``dynamic_multimask_via_stability``, as in Meta's predictor).

    Args:
        image_embeddings: ``(1, 4 C, h, w)`` of :func:`encode_image`.

    Raises:
        ValueError: Shapes do not fit, a number is not finite, a label is unknown, or a box is upside down.
    """
    check_prompts(mask_side(model), points, labels, boxes, masks)
    # Labels choose rows of a table here; predictors bring them as floating-point numbers.
    labels = None if labels is None else labels.long()
    sparse, dense = embed_prompts(model.prompt_encoder, points, labels, boxes, masks)
    count, decoder = sparse.shape[0], model.mask_decoder
    *finer, embedding = unfold(image_embeddings.to(model.device))
    if count == 0:
        n_masks = decoder.num_multimask_outputs if multimask_output else 1
        shapes = ((0, n_masks, *finer[0].shape[-2:]), (0, n_masks))
        return tuple(torch.zeros(shape, device=model.device) for shape in shapes)
    # Prompts with a mask each are images of their own to transformers' decoder; others are prompts of one image.
    n_images = count if dense.shape[0] > 1 else 1
    low_res, iou = decoder(
        **_image_arguments(model, embedding, finer, n_images),
        sparse_prompt_embeddings=sparse[:, None] if n_images > 1 else sparse[None],
        dense_prompt_embeddings=dense,
        multimask_output=multimask_output,
    )[:2]
    return low_res.flatten(0, 1).float(), iou.flatten(0, 1).float()


@torch.no_grad()
def decoder_input(model: PreTrainedModel, embedding: Tensor, boxes: Tensor) -> Tensors:
    """Arguments of the two-way transformer for the box prompts of one image; see SAM's function of this name.

    Args:
        model: The model; its prompt encoder stays in floating point.
        embedding: ``(1, 4 C, h, w)`` of :func:`encode_image`.
        boxes: (prompts, 4) XYXY in input pixels.
    """
    sparse, dense = embed_prompts(model.prompt_encoder, boxes=boxes)
    *finer, embedding = unfold(embedding)
    return transformer_arguments(
        model,
        **_image_arguments(model, embedding, finer, 1),
        sparse_prompt_embeddings=sparse[None],
        dense_prompt_embeddings=dense,
    )


def decode(model: PreTrainedModel, embedding: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and predicted IoU of the box prompts of one image, prompts along the first dimension; gradients pass.

    Args:
        model: The model.
        embedding: ``(1, 4 C, h, w)`` of :func:`encode_image`.
        boxes: (prompts, 4) XYXY in input pixels.
    """
    with torch.no_grad():
        sparse, dense = embed_prompts(model.prompt_encoder, boxes=boxes)
    *finer, embedding = unfold(embedding)
    low_res, iou = model.mask_decoder(
        **_image_arguments(model, embedding, finer, len(sparse)),
        sparse_prompt_embeddings=sparse[:, None],
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )[:2]
    return low_res.flatten(0, 1).float(), iou.flatten(0, 1).float()


def _image_arguments(model: PreTrainedModel, embedding: Tensor, finer: list[Tensor], count: int) -> dict[str, object]:
    """What the decoder takes of an image without memory, ``count`` times."""
    embedding = embedding + model.no_memory_embedding.view(1, -1, 1, 1)
    return {
        "image_embeddings": embedding.expand(count, -1, -1, -1),
        "image_positional_embeddings": model.get_image_wide_positional_embeddings().expand(count, -1, -1, -1),
        "high_resolution_features": [each.expand(count, -1, -1, -1) for each in finer],
    }


def mask_side(model: PreTrainedModel) -> int:
    """Side of the masks that the decoder gives and takes, in pixels."""
    return int(model.prompt_encoder.mask_input_size[0])
