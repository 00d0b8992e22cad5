"""A model's input frame: resize, normalise, pad, and the way back for masks.

SAM pads, with segment-anything's arithmetic (``ResizeLongestSide``, ``Sam.preprocess``, ``Sam.postprocess_masks``), so
that scores are those of the original code. SAM 2 stretches the image to the square and masks straight back; Meta's code
resizes in floating point, this in Pillow's 8 bits, as for SAM (at most half a grey level apart).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from carsam.data.images.normalisation import IMAGENET, Normalisation, Triple, normalisation_of, to_preprocessor
from carsam.models.family import family_of

Coords = TypeVar("Coords", np.ndarray, Tensor)


def resized_size(original_size: tuple[int, int], longest_side: int, stretched: bool = False) -> tuple[int, int]:
    """Size ``(h, w)`` after the longest side became ``longest_side``, rounded as in segment-anything.

    A side that would round to nothing stays at one pixel. With ``stretched`` both sides become ``longest_side``.
    """
    if stretched:
        return longest_side, longest_side
    scale = longest_side * 1.0 / max(original_size)
    height, width = (max(1, int(side * scale + 0.5)) for side in original_size)
    return height, width


def resize_image(image: np.ndarray, longest_side: int, stretched: bool = False) -> np.ndarray:
    """Bilinear resize of an ``(H, W, 3)`` uint8 image, antialiased by Pillow as segment-anything does it."""
    height, width = resized_size(image.shape[:2], longest_side, stretched)
    return np.array(Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BILINEAR))


@dataclass(frozen=True)
class Geometry:
    """How an image lies in the input frame.

    Attributes:
        original_size: ``(h, w)`` of the image file.
        input_size: ``(h, w)`` after the resize, before padding at the right and bottom.
        stretched: Whether the frame is the stretched image, so that masks need no crop.
    """

    original_size: tuple[int, int]
    input_size: tuple[int, int]
    stretched: bool = False

    def points_to_input(self, coords: Coords) -> Coords:
        """Points ``(..., 2)`` as (x, y) in pixels of the original image, in pixels of the input frame.

        Arrays come back as float64, tensors as float32.
        """
        scale = (self.input_size[1] / self.original_size[1], self.input_size[0] / self.original_size[0])
        if isinstance(coords, Tensor):
            return coords.to(torch.float32) * torch.tensor(scale, dtype=torch.float32, device=coords.device)
        return np.asarray(coords, dtype=np.float64) * np.array(scale)

    def boxes_to_input(self, boxes: Coords) -> Coords:
        """Boxes ``(..., 4)`` XYXY in pixels of the original image, in pixels of the input frame."""
        return self.points_to_input(boxes.reshape(*boxes.shape[:-1], 2, 2)).reshape(boxes.shape)

    def boxes_to_original(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes ``(..., 4)`` XYXY in pixels of the input frame, in pixels of the original image, float64."""
        (height, width), (input_height, input_width) = self.original_size, self.input_size
        return boxes.astype(np.float64) * np.array([width / input_width, height / input_height] * 2)

    def masks_to_original(self, low_res: Tensor, image_size: int) -> Tensor:
        """Mask logits of the decoder at the original image's size.

        Bilinear to the padded input frame, cropped, bilinear to the original: the order matters for the borders. Where
        the image was stretched, bilinear to the original in one step.

        Args:
            low_res: Logits ``(..., h, w)`` over the padded frame.
            image_size: Side of the input frame in pixels.

        Returns:
            Logits ``(..., H, W)``, float32.
        """
        lead = low_res.shape[:-2]
        logits = low_res.reshape(-1, 1, *low_res.shape[-2:]).float()
        if not self.stretched:
            logits = F.interpolate(logits, (image_size, image_size), mode="bilinear", align_corners=False)
            logits = logits[..., : self.input_size[0], : self.input_size[1]]
        logits = F.interpolate(logits, tuple(self.original_size), mode="bilinear", align_corners=False)
        return logits.reshape(*lead, *self.original_size)


@dataclass(frozen=True)
class Preprocessor:
    """Image to input tensor.

    Attributes:
        image_size: Side of the square input frame in pixels.
        normalisation: What becomes of the pixels.
        stretched: Whether images are stretched to the frame instead of padded.
    """

    image_size: int
    normalisation: Normalisation = IMAGENET
    stretched: bool = False

    @classmethod
    def for_model(cls, model: PreTrainedModel) -> Preprocessor:
        """The preprocessor that fits a model's input size and its own normalisation.

        Raises:
            CheckpointError: What the model or its folder says of normalisation cannot be used.
        """
        family = family_of(model)
        return cls(family.image_size(model), normalisation_of(model), family.stretched)

    @property
    def mean(self) -> Triple:
        """Per channel, on the scale 0..255."""
        return self.normalisation.pixel_mean

    @property
    def std(self) -> Triple:
        """Per channel, on the scale 0..255."""
        return self.normalisation.pixel_std

    def __call__(self, image: np.ndarray) -> tuple[Tensor, Geometry]:
        """Resizes, normalises and pads.

        Args:
            image: ``(H, W, 3)`` uint8 RGB.

        Returns:
            ``(1, 3, S, S)`` float32 with zeros (after normalisation) at the right and bottom, and the geometry.

        Raises:
            ValueError: The image has another shape or type.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise ValueError(f"an image must be (H, W, 3) uint8 RGB, not {image.shape} {image.dtype}; see read_image.")
        resized = torch.from_numpy(resize_image(image, self.image_size, self.stretched))
        size = (image.shape[0], image.shape[1])
        geometry = Geometry(size, (resized.shape[0], resized.shape[1]), self.stretched)
        return self.normalise(resized.permute(2, 0, 1)[None]), geometry

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalises and pads ``(B, 3, h, w)`` pixels on the scale 0..255 to ``(B, 3, S, S)`` float32."""
        height, width = pixels.shape[-2:]
        normalised = self.normalisation(pixels)
        return F.pad(normalised, (0, self.image_size - width, 0, self.image_size - height)).contiguous()


def preprocessor_config(model: PreTrainedModel) -> dict[str, Any]:
    """``preprocessor_config.json`` for transformers' image processor, describing the same preprocessing.

    Its pixels are bitwise those of :class:`Preprocessor` (where Pillow resizes; torchvision's resize rounds otherwise).
    """
    preprocessor = Preprocessor.for_model(model)
    size = preprocessor.image_size
    family = family_of(model)
    low_res = family.low_res_size(model)
    processor, image_processor = family.names.processors
    square, low_res_square = ({"height": side, "width": side} for side in (size, low_res))
    if family.stretched:
        frame = {"mask_size": low_res_square, "size": square}
    else:
        frame = {
            "do_pad": True,
            "mask_pad_size": low_res_square,
            "mask_size": {"longest_edge": low_res},
            "pad_size": square,
            "size": {"longest_edge": size},
        }
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "image_processor_type": image_processor,
        "processor_class": processor,
        "resample": 2,
        **frame,
        **to_preprocessor(preprocessor.normalisation),
    }
