"""Calibration without reconstruction: ranges of all activation sites from the float model in one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from carsam.calibrate.observers import RangeRecorder
from carsam.models.family import ENCODED, family_of
from carsam.prompts.calibration import CalibrationImage, CalibrationSet
from carsam.quantizers import simulate


def calibrate(
    model: nn.Module,
    data: CalibrationSet,
    observer: str,
    *,
    encode: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Sets the range of every activation site to what the observer makes of the float activations.

    Args:
        model: A model with quantized layers; runs in floating point here.
        data: Calibration images with boxes.
        observer: Name of the observer.
        encode: Gives the image embeddings of pixels where no site lies in the image encoder; None runs that too.
        progress: Called as ``progress(images_done, n_images)``.
    """
    recorder = RangeRecorder([model])
    with recorder.recording(), simulate(weights=False, activations=False):
        family = family_of(model)
        for done, image in enumerate(data.images, start=1):
            if encode is not None and not _decoded(model, encode, image):
                encode = None
            if encode is None:
                family.forward(model, image)
            if progress is not None:
                progress(done, len(data.images))
    recorder.apply(observer)


def _decoded(model: nn.Module, encode: Callable[[Tensor], Tensor], image: CalibrationImage) -> bool:
    """Runs the decoder alone over an image; False where the family cannot."""
    with torch.no_grad():
        encoded = {ENCODED: encode(image.pixel_values)}
        return family_of(model).decode(model, encoded, image) is not None
