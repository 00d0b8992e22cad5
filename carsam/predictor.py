"""segment-anything's ``SamPredictor`` over a transformers ``SamModel``, float or quantized.

Below it, :func:`encode_image` and :func:`predict_logits` run the two halves of the model; calibration and evaluation
use the same two functions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import SamModel

from carsam.data.transforms import Geometry, Preprocessor, resize_image, resized_size


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

    transformers lays prompts out as (images, prompts an image, ...) and has one dense prompt an image. Without mask
    prompts, or with one for all, the B prompts go into its second dimension; with a mask for each prompt they go into
    the first, with the image repeated.

    Args:
        model: The model.
        image_embeddings: ``(1, C, h, w)``.
        points: ``(B, N, 2)`` as (x, y) in pixels of the input frame.
        labels: ``(B, N)``: 1 foreground, 0 background, -1 no point.
        boxes: ``(B, 4)`` or ``(B, 1, 4)`` XYXY in pixels of the input frame.
        masks: Logits ``(B, 1, h, w)`` or ``(1, 1, h, w)`` of an earlier prediction.
        multimask_output: Three masks a prompt instead of one.

    Returns:
        Low-resolution logits ``(B, M, h, w)`` and predicted IoU ``(B, M)``, float32.

    Raises:
        ValueError: Shapes do not fit.
    """
    count = _check_prompts(model, points, labels, boxes, masks)
    device = model.device
    by_image = masks is not None and count > 1 and masks.shape[0] == count

    def lay_out(prompt: Tensor | None) -> Tensor | None:
        if prompt is None:
            return None
        return (prompt[:, None] if by_image else prompt[None]).to(device)

    # Coordinates stay in float32: float16 has no half pixels beyond 1024.
    sparse, dense = model.prompt_encoder(
        input_points=lay_out(None if points is None else points.float()),
        input_labels=lay_out(labels),
        input_boxes=lay_out(None if boxes is None else boxes.float().reshape(-1, 4)),
        input_masks=None if masks is None else masks.to(device=device, dtype=model.dtype),
    )
    n_images = count if by_image else 1
    low_res, iou = model.mask_decoder(
        image_embeddings=image_embeddings.to(device).expand(n_images, -1, -1, -1),
        image_positional_embeddings=model.get_image_wide_positional_embeddings().expand(n_images, -1, -1, -1),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask_output,
    )[:2]
    return low_res.flatten(0, 1).float(), iou.flatten(0, 1).float()


def _check_prompts(
    model: SamModel, points: Tensor | None, labels: Tensor | None, boxes: Tensor | None, masks: Tensor | None
) -> int:
    """The number of prompts B, after checking shapes."""
    if (points is None) != (labels is None):
        raise ValueError("point coordinates and point labels must be given together.")
    if points is not None and (points.ndim != 3 or points.shape[2] != 2 or labels.shape != points.shape[:2]):
        raise ValueError(
            f"points must be (B, N, 2) with labels (B, N), not {tuple(points.shape)} with {tuple(labels.shape)}."
        )
    if boxes is not None and (boxes.shape[-1] != 4 or boxes.ndim not in (2, 3) or boxes.shape[1:-1].numel() != 1):
        raise ValueError(f"boxes must be (B, 4) XYXY, one box a prompt, not {tuple(boxes.shape)}.")
    side = 4 * int(model.config.prompt_encoder_config.image_embedding_size)
    if masks is not None and (masks.ndim != 4 or tuple(masks.shape[1:]) != (1, side, side)):
        raise ValueError(f"mask inputs must be (B, 1, {side}, {side}) logits, not {tuple(masks.shape)}.")
    counts = {prompt.shape[0] for prompt in (points, boxes) if prompt is not None}
    if len(counts) > 1:
        raise ValueError(f"as many boxes as point prompts are needed, not {boxes.shape[0]} and {points.shape[0]}.")
    n_masks = 1 if masks is None else masks.shape[0]
    count = counts.pop() if counts else n_masks
    if n_masks not in (1, count):
        raise ValueError(f"as many mask inputs as prompts (or one) are needed, not {n_masks} and {count}.")
    return count


class ResizeLongestSide:
    """segment-anything's transform of the same name: image, points and boxes into the input frame."""

    def __init__(self, target_length: int) -> None:
        self.target_length = target_length

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Resizes an ``(H, W, 3)`` uint8 image."""
        return resize_image(image, self.target_length)

    def apply_coords(self, coords: np.ndarray, original_size: tuple[int, ...]) -> np.ndarray:
        """Points ``(..., 2)`` from the original image, of size ``(H, W)``, into the input frame; float64."""
        return self._geometry(original_size).points_to_input(np.asarray(coords))

    def apply_boxes(self, boxes: np.ndarray, original_size: tuple[int, ...]) -> np.ndarray:
        """Boxes ``(B, 4)`` or ``(4,)`` XYXY from the original image into the input frame; ``(B, 4)`` float64."""
        return self._geometry(original_size).boxes_to_input(np.asarray(boxes).reshape(-1, 4))

    def apply_image_torch(self, image: Tensor) -> Tensor:
        """Resizes ``(B, C, H, W)`` float images; may differ slightly from :meth:`apply_image`.

        segment-anything reads the size off the wrong dimensions here; this one off the last two.
        """
        size = self.get_preprocess_shape(image.shape[-2], image.shape[-1], self.target_length)
        return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)

    def apply_coords_torch(self, coords: Tensor, original_size: tuple[int, ...]) -> Tensor:
        """As :meth:`apply_coords`; float32."""
        return self._geometry(original_size).points_to_input(coords)

    def apply_boxes_torch(self, boxes: Tensor, original_size: tuple[int, ...]) -> Tensor:
        """As :meth:`apply_boxes`; float32."""
        return self._geometry(original_size).boxes_to_input(boxes.reshape(-1, 4))

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        """Size ``(h, w)`` after the resize."""
        return resized_size((oldh, oldw), long_side_length)

    def _geometry(self, original_size: tuple[int, ...]) -> Geometry:
        height, width = original_size
        return Geometry((height, width), resized_size((height, width), self.target_length))


class SamPredictor:
    """Predicts masks for prompts on one image: set the image once, then prompt it many times.

    The interface is that of ``segment_anything.SamPredictor``, so code written for it runs unchanged. ``model`` is a
    transformers ``SamModel``.

    Attributes:
        model: The model.
        transform: Image, points and boxes into the input frame.
        is_image_set: Whether an image is set.
        features: Image embeddings ``(1, C, h, w)`` of the image, or None.
        original_size: ``(H, W)`` of the image, or None.
        input_size: ``(H, W)`` of the resized image before padding, or None.
    """

    image_format = "RGB"

    def __init__(self, sam_model: SamModel) -> None:
        self.model = sam_model
        self.preprocessor = Preprocessor.for_model(sam_model)
        self.transform = ResizeLongestSide(self.preprocessor.image_size)
        self.reset_image()

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    @property
    def mask_threshold(self) -> float:
        """Logit at which masks are cut: the model's ``mask_threshold`` where somebody set one, else 0."""
        return float(getattr(self.model, "mask_threshold", 0.0))

    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        """Computes the image's embeddings.

        Args:
            image: ``(H, W, 3)`` uint8.
            image_format: ``RGB`` or ``BGR``.

        Raises:
            ValueError: The format is unknown or the array is no such image.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be RGB or BGR, not {image_format!r}.")
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"an image must be (H, W, 3) uint8, not {image.shape} {image.dtype}.")
        if image_format != self.image_format:
            image = image[..., ::-1]
        pixels = torch.as_tensor(self.transform.apply_image(image), device=self.device)
        self.set_torch_image(pixels.permute(2, 0, 1).contiguous()[None], image.shape[:2])

    def set_torch_image(self, transformed_image: Tensor, original_image_size: tuple[int, ...]) -> None:
        """Computes the embeddings of an image that is already resized.

        Args:
            transformed_image: ``(1, 3, h, w)`` on the scale 0..255, longest side as the model's input.
            original_image_size: ``(H, W)`` before the resize.

        Raises:
            ValueError: The shape is another.
        """
        side = self.preprocessor.image_size
        shape = tuple(transformed_image.shape)
        if len(shape) != 4 or shape[0] != 1 or shape[1] != 3 or max(shape[2:]) != side:
            raise ValueError(f"set_torch_image needs (1, 3, h, w) with the long side {side}, not {shape}.")
        self.reset_image()
        features = encode_image(self.model, self.preprocessor.normalise(transformed_image.to(self.device)))
        self.original_size = (int(original_image_size[0]), int(original_image_size[1]))
        self.input_size = (shape[2], shape[3])
        self.features = features
        self.is_image_set = True

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predicts masks for one prompt on the image.

        Args:
            point_coords: ``(N, 2)`` points as (x, y) in pixels of the image.
            point_labels: ``(N,)``: 1 foreground, 0 background.
            box: ``(4,)`` XYXY in pixels of the image.
            mask_input: ``(1, h, w)`` low-resolution logits of an earlier prediction (256 × 256 for SAM).
            multimask_output: Three masks, for ambiguous prompts; otherwise one.
            return_logits: Logits instead of binary masks.

        Returns:
            Masks ``(C, H, W)`` bool (or float32 logits), predicted IoU ``(C,)`` and low-resolution logits
            ``(C, h, w)``.

        Raises:
            RuntimeError: No image is set.
            ValueError: Shapes do not fit.
        """
        self._require_image()
        points = labels = boxes = masks = None
        if point_coords is not None:
            if point_labels is None:
                raise ValueError("point_labels must be supplied if point_coords is supplied.")
            coords = self.transform.apply_coords(point_coords, self.original_size)
            points = torch.as_tensor(coords, dtype=torch.float, device=self.device)[None]
            labels = torch.as_tensor(np.asarray(point_labels), dtype=torch.int, device=self.device)[None]
        if box is not None:
            if np.size(box) != 4:
                raise ValueError(f"box must be 4 numbers XYXY, not {np.shape(box)}; predict_torch takes several boxes.")
            coords = self.transform.apply_boxes(box, self.original_size)
            boxes = torch.as_tensor(coords, dtype=torch.float, device=self.device)
        if mask_input is not None:
            masks = torch.as_tensor(np.asarray(mask_input), dtype=torch.float, device=self.device)[None]
        outputs = self.predict_torch(points, labels, boxes, masks, multimask_output, return_logits)
        masks, iou, low_res = (output[0].detach().cpu().numpy() for output in outputs)
        return masks, iou, low_res

    def predict_torch(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predicts masks for B prompts, given in pixels of the input frame (see ``transform``).

        Args:
            point_coords: ``(B, N, 2)`` points as (x, y).
            point_labels: ``(B, N)``: 1 foreground, 0 background.
            boxes: ``(B, 4)`` XYXY.
            mask_input: ``(B, 1, h, w)`` low-resolution logits of an earlier prediction.
            multimask_output: Three masks a prompt instead of one.
            return_logits: Logits instead of binary masks.

        Returns:
            Masks ``(B, C, H, W)`` bool (or float32 logits) in the image's size, predicted IoU ``(B, C)`` and
            low-resolution logits ``(B, C, h, w)``.

        Raises:
            RuntimeError: No image is set.
            ValueError: Shapes do not fit.
        """
        self._require_image()
        low_res, iou = predict_logits(
            self.model,
            self.features,
            points=point_coords,
            labels=point_labels if point_coords is not None else None,
            boxes=boxes,
            masks=mask_input,
            multimask_output=multimask_output,
        )
        geometry = Geometry(self.original_size, self.input_size)
        masks = geometry.masks_to_original(low_res, self.preprocessor.image_size)
        return masks if return_logits else masks > self.mask_threshold, iou, low_res

    def get_image_embedding(self) -> Tensor:
        """Embeddings ``(1, C, h, w)`` of the image.

        Raises:
            RuntimeError: No image is set.
        """
        self._require_image()
        return self.features

    def reset_image(self) -> None:
        """Forgets the image."""
        self.is_image_set = False
        self.features: Tensor | None = None
        self.original_size: tuple[int, int] | None = None
        self.input_size: tuple[int, int] | None = None

    def _require_image(self) -> None:
        if not self.is_image_set:
            raise RuntimeError("an image must be set with .set_image(...) before mask prediction.")
