"""A SAM in two halves: an image becomes embeddings, and prompts with embeddings become masks.

Prediction, calibration, evaluation and the drop-in for segment-anything all run the model through these functions, so
that the same prompt gives the same numbers everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import SamModel

from carsam.models.prompts import check_prompts


@torch.no_grad()
def encode_image(model: SamModel, pixel_values: Tensor) -> Tensor:
    """Image embeddings ``(B, C, h, w)`` of preprocessed images ``(B, 3, S, S)``, on the model's device."""
    return model.get_image_embeddings(pixel_values.to(device=model.device, dtype=model.dtype))


@torch.no_grad()
def predict_logits(
    model: SamModel,
    image_embeddings: Tensor,
    *,
    points: Tensor | None = None,
    labels: Tensor | None = None,
    boxes: Tensor | None = None,
    masks: Tensor | None = None,
    multimask_output: bool = False,
) -> tuple[Tensor, Tensor]:
    """Decodes B prompts of one image, with segment-anything's batching.

    Args:
        model: The model.
        image_embeddings: ``(1, C, h, w)``.
        points: ``(B, N, 2)`` as (x, y) in pixels of the input frame.
        labels: ``(B, N)``: 1 foreground, 0 background, -1 no point.
        boxes: ``(B, 4)`` or ``(B, 1, 4)`` XYXY in pixels of the input frame.
        masks: Logits ``(B, 1, h, w)`` or ``(1, 1, h, w)`` of an earlier prediction.
        multimask_output: Three masks a prompt instead of one.

    Returns:
        Low-resolution logits ``(B, M, h, w)`` and predicted IoU ``(B, M)``, float32. Zero prompts give zero masks.

    Raises:
        ValueError: Shapes do not fit, a number is not finite, a label is unknown, or a box is upside down.
    """
    check_prompts(4 * int(model.config.prompt_encoder_config.image_embedding_size), points, labels, boxes, masks)
    sparse, dense = embed_prompts(model.prompt_encoder, points, labels, boxes, masks)
    return decode_prompts(
        model.mask_decoder,
        image_embeddings.to(model.device),
        model.get_image_wide_positional_embeddings(),
        sparse,
        dense,
        multimask_output,
    )


def embed_prompts(
    encoder: torch.nn.Module,
    points: Tensor | None = None,
    labels: Tensor | None = None,
    boxes: Tensor | None = None,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Embeds B prompts in segment-anything's layout; gradients pass.

    Args:
        encoder: The ``prompt_encoder`` of a ``SamModel`` or ``Sam2Model``.
        points: ``(B, N, 2)``.
        labels: ``(B, N)``.
        boxes: ``(B, 4)`` or ``(B, 1, 4)``.
        masks: ``(D, 1, h, w)``.

    Returns:
        Embeddings of points and boxes ``(B, T, C)``, and of masks ``(D, C, h, w)``; D is 1 without masks: the same for
        every prompt.
    """
    weight = encoder.no_mask_embed.weight
    device, dtype = weight.device, weight.dtype

    def lay_out(prompt: Tensor | None) -> Tensor | None:
        return None if prompt is None else prompt[None].to(device)

    # transformers has images in the first dimension and prompts in the second. Coordinates stay in float32: float16 has
    # no half pixels beyond 1024.
    sparse, dense = encoder(
        input_points=lay_out(None if points is None else points.float()),
        # SAM 2's prompt encoder looks labels up in a table.
        input_labels=lay_out(None if labels is None else labels.long()),
        input_boxes=lay_out(None if boxes is None else boxes.float().reshape(-1, 4)),
        input_masks=None if masks is None else masks.to(device=device, dtype=dtype),
    )
    if sparse is None:
        sparse = weight.new_zeros(1, dense.shape[0], 0, weight.shape[-1])
    return sparse[0], dense


def decode_prompts(
    decoder: torch.nn.Module,
    image_embeddings: Tensor,
    image_pe: Tensor,
    sparse: Tensor,
    dense: Tensor,
    multimask_output: bool,
) -> tuple[Tensor, Tensor]:
    """Decodes B embedded prompts; gradients pass.

    Where one dense embedding serves all prompts, they go into transformers' second dimension (prompts of one image);
    with a mask or an image for each prompt they go into the first, with the image repeated.

    Args:
        decoder: A ``SamModel``'s ``mask_decoder``.
        image_embeddings: ``(1, C, h, w)``, or one for each prompt ``(B, C, h, w)``.
        image_pe: Positional embeddings ``(1, C, h, w)``.
        sparse: ``(B, T, C)``.
        dense: ``(1, C, h, w)`` or ``(B, C, h, w)``.
        multimask_output: Three masks a prompt instead of one.

    Returns:
        Low-resolution logits ``(B, M, h, w)`` and predicted IoU ``(B, M)``, float32.
    """
    count = sparse.shape[0]
    if count == 0:
        n_masks = decoder.num_multimask_outputs if multimask_output else 1
        height, width = (4 * side for side in image_embeddings.shape[-2:])
        shapes = ((0, n_masks, height, width), (0, n_masks))
        return tuple(torch.zeros(shape, device=image_embeddings.device) for shape in shapes)
    by_image = max(dense.shape[0], image_embeddings.shape[0]) > 1
    n_images = count if by_image else 1
    low_res, iou = decoder(
        image_embeddings=image_embeddings.expand(n_images, -1, -1, -1),
        image_positional_embeddings=image_pe.expand(n_images, -1, -1, -1),
        sparse_prompt_embeddings=sparse[:, None] if by_image else sparse[None],
        dense_prompt_embeddings=dense,
        multimask_output=multimask_output,
    )[:2]
    return low_res.flatten(0, 1).float(), iou.flatten(0, 1).float()
