"""segment-anything's ``SamPredictor`` over a transformers model, float or quantized."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carsam.data.images.transforms import Geometry, Preprocessor, resize_image, resized_size
from carsam.models.forward import encode_image, predict_logits
from carsam.predict.segment_anything import as_sam_model

__all__ = ["ResizeLongestSide", "SamPredictor", "encode_image", "predict_logits", "threshold_masks"]

# Pixels of mask logits in memory at a time: 64 MB.
CHUNK_PIXELS = 2**24


class ResizeLongestSide:
    """segment-anything's transform of the same name: image, points and boxes into the input frame.

    Args:
        target_length: Longest side of the resized image, in pixels.
        stretched: Both sides become ``target_length``, as SAM 2 has it.
    """

    def __init__(self, target_length: int, stretched: bool = False) -> None:
        self.target_length, self.stretched = target_length, stretched

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Resizes an ``(H, W, 3)`` uint8 image."""
        return resize_image(image, self.target_length, self.stretched)

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
        size = self._geometry(image.shape[-2:]).input_size
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
        size = resized_size((height, width), self.target_length, self.stretched)
        return Geometry((height, width), size, self.stretched)


class SamPredictor:
    """Predicts masks for prompts on one image: set the image once, then prompt it many times.

    The interface is that of ``segment_anything.SamPredictor``, so code written for it runs unchanged.

    Args:
        sam_model: A transformers model, float or packed, or the folder, file or Hub id of one.
        runtime: ``torch``, ``onnx`` or ``cuda``, see :func:`carsam.load`; None leaves a model where it computes.

    Raises:
        ValueError: The model is something else, or the runtime does not run it.

    Attributes:
        model: The model.
        transform: Image, points and boxes into the input frame.
        is_image_set: Whether an image is set.
        features: Image embeddings ``(1, C, h, w)`` of the image, or None.
        original_size: ``(H, W)`` of the image, or None.
        input_size: ``(H, W)`` of the resized image before padding, or None.
    """

    image_format = "RGB"

    def __init__(self, sam_model: nn.Module | str | Path, runtime: str | None = None) -> None:
        self.model = as_sam_model(sam_model, runtime)
        self.preprocessor = Preprocessor.for_model(self.model)
        self.transform = ResizeLongestSide(self.preprocessor.image_size, self.preprocessor.stretched)
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
            ValueError: The format is unknown or the array is no such image; the message says how to make it one.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be RGB or BGR, not {image_format!r}.")
        require_image(image)
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
        height, width = _image_size(original_image_size)
        expected = resized_size((height, width), side, self.preprocessor.stretched)
        if max(abs(a - b) for a, b in zip(shape[2:], expected)) > 1:
            raise ValueError(
                f"an image of {height} × {width} (height × width) becomes {expected} before padding, not {shape[2:]}; "
                "original_image_size is (height, width), and transform.apply_image resizes."
            )
        if not bool(torch.isfinite(transformed_image).all()):
            raise ValueError("the image holds NaN or infinite numbers; give pixels on the scale 0..255.")
        self.reset_image()
        features = encode_image(self.model, self.preprocessor.normalise(transformed_image.to(self.device)))
        self.original_size = (height, width)
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
            ``(C, h, w)``. Without a box in ``box``, which is then ``(0, 4)``, C is 0.

        Raises:
            RuntimeError: No image is set.
            ValueError: Shapes do not fit.
        """
        prompt = self._prompt_tensors(point_coords, point_labels, box, mask_input)
        outputs = self.predict_torch(*prompt, multimask_output, return_logits)
        # (1, C, ...) loses its first dimension, and (0, C, ...) becomes (0, ...).
        masks, iou, low_res = (output.detach().flatten(0, 1).cpu().numpy() for output in outputs)
        return masks, iou, low_res

    def predict_low_res(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`predict`, without the masks at the image's size: logits ``(1, C, h, w)`` and IoU ``(1, C)``."""
        points, labels, boxes, masks = self._prompt_tensors(point_coords, point_labels, box, mask_input)
        return predict_logits(
            self.model,
            self.features,
            points=points,
            labels=labels,
            boxes=boxes,
            masks=masks,
            multimask_output=multimask_output,
        )

    def _prompt_tensors(
        self, point_coords: Any, point_labels: Any, box: Any, mask_input: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """One prompt as :meth:`predict_torch` takes it.

        Raises:
            RuntimeError: No image is set.
            ValueError: Shapes do not fit, or what should be numbers is none.
        """
        self._require_image()
        points = labels = boxes = masks = None
        if point_coords is not None:
            if point_labels is None:
                raise ValueError("point_labels must be supplied if point_coords is supplied.")
            coords = _numbers(point_coords, "point_coords")
            if coords.ndim != 2 or coords.shape[1] != 2:
                raise ValueError(f"points must be (N, 2) as (x, y), not {coords.shape}; predict_torch takes batches.")
            coords = self.transform.apply_coords(coords, self.original_size)
            points = torch.as_tensor(coords, dtype=torch.float, device=self.device)[None]
            labels = torch.as_tensor(_numbers(point_labels, "point_labels"), dtype=torch.float, device=self.device)
            if labels.shape != points.shape[1:2]:
                raise ValueError(f"as many labels as points are needed, not {tuple(labels.shape)} for {len(coords)}.")
            labels = labels[None]
        elif point_labels is not None:
            raise ValueError("point_labels are given without point_coords; give both or neither.")
        if box is not None:
            box = _numbers(box, "box")
            if box.size != 4 and box.shape != (0, 4):
                raise ValueError(f"box must be 4 numbers XYXY, not {box.shape}; predict_torch takes several boxes.")
            coords = self.transform.apply_boxes(box, self.original_size)
            boxes = torch.as_tensor(coords, dtype=torch.float, device=self.device)
        if mask_input is not None:
            masks = torch.as_tensor(_numbers(mask_input, "mask_input"), dtype=torch.float, device=self.device)[None]
        if boxes is not None and not len(boxes):
            # No box, no mask; whatever points came with it belong to no object.
            points = labels = masks = None
        return points, labels, boxes, masks

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
        side = self.preprocessor.image_size
        if return_logits:
            return _logits(low_res, self.geometry, side), iou, low_res
        return threshold_masks(low_res, self.geometry, side, self.mask_threshold), iou, low_res

    @property
    def geometry(self) -> Geometry:
        """How the image lies in the input frame.

        Raises:
            RuntimeError: No image is set.
        """
        self._require_image()
        return Geometry(self.original_size, self.input_size, self.preprocessor.stretched)

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


def threshold_masks(low_res: Tensor, geometry: Geometry, image_size: int, threshold: float) -> Tensor:
    """Masks at the original image's size, of which only some are in memory as logits at a time.

    Args:
        low_res: Logits ``(B, C, h, w)`` of the decoder.
        geometry: How the image lies in the input frame.
        image_size: Side of the input frame in pixels.
        threshold: Logit above which a pixel belongs to the mask.

    Returns:
        ``(B, C, H, W)`` bool.
    """
    height, width = geometry.original_size
    flat = low_res.flatten(0, 1)
    masks = torch.empty((len(flat), height, width), dtype=torch.bool, device=low_res.device)
    step = max(1, CHUNK_PIXELS // (height * width))
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        torch.gt(geometry.masks_to_original(flat[part], image_size), threshold, out=masks[part])
    return masks.unflatten(0, low_res.shape[:2])


def _logits(low_res: Tensor, geometry: Geometry, image_size: int) -> Tensor:
    if not low_res.shape[0]:
        return low_res.new_zeros((*low_res.shape[:2], *geometry.original_size))
    return geometry.masks_to_original(low_res, image_size)


def require_image(image: Any) -> None:
    """Refuses what is no ``(H, W, 3)`` uint8 image.

    Raises:
        ValueError: With the way to make it one.
    """
    form = "an image must be an (H, W, 3) uint8 array"
    if isinstance(image, (str, PathLike)):
        raise ValueError(f"{form}, not a path; read the file with carsam.read_image({str(image)!r}).")
    if isinstance(image, Tensor):
        raise ValueError(f"{form}, not a tensor; use image.cpu().numpy(), or set_torch_image for a resized image.")
    if not isinstance(image, np.ndarray):
        fix = "use np.asarray(image.convert('RGB'))" if hasattr(image, "convert") else "use np.asarray(image)"
        raise ValueError(f"{form}, not {type(image).__module__}.{type(image).__qualname__}; {fix}.")
    if image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and image.size:
        return
    if 0 in image.shape:
        fix = "it has no pixels"
    elif image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1):
        fix = "repeat the grey channel: np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)"
    elif image.ndim == 3 and image.shape[2] == 4:
        fix = "leave out the fourth channel (transparency): image[..., :3]"
    elif image.ndim == 3 and image.shape[0] == 3:
        fix = "put the channels last: image.transpose(1, 2, 0)"
    elif image.ndim == 4:
        fix = "set one image at a time: images[0]"
    elif image.dtype != np.uint8 and np.issubdtype(image.dtype, np.floating):
        fix = "bring it to 0..255: (255 * image).round().astype(np.uint8) where its values are 0..1"
    else:
        fix = "scale its values to 0..255 and use astype(np.uint8)"
    raise ValueError(f"{form}, not {image.shape} {image.dtype}; {fix}.")


def _numbers(values: Any, name: str) -> np.ndarray:
    """Values as float64, checked to be finite numbers.

    Raises:
        ValueError: They are not.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
    try:
        if np.asarray(values).dtype.kind not in "biufO":  # complex numbers, dates and text would be converted
            raise TypeError(f"it holds {np.asarray(values).dtype}")
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}.") from error
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} holds NaN or infinite numbers; give finite ones, in pixels of the image.")
    return numbers


def _image_size(size: Any) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in size)
    except (TypeError, ValueError) as error:
        raise ValueError(f"original_image_size must be (height, width), not {size!r}.") from error
    if height < 1 or width < 1:
        raise ValueError(f"original_image_size must be (height, width) in pixels, not {size!r}.")
    return height, width
