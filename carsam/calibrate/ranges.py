"""Calibration without reconstruction: ranges of all activation sites from the float model in one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import SamModel

from carsam.calibrate.observers import RangeRecorder
from carsam.prompts.calibration import CalibrationSet
from carsam.quantizers import simulate


def calibrate(
    model: SamModel,
    data: CalibrationSet,
    observer: str,
    *,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Sets the range of every activation site to what the observer makes of the float activations.

    Args:
        model: A model with quantized layers; runs in floating point here.
        data: Calibration images with boxes.
        observer: Name of the observer.
        device: Where the model lies.
        progress: Called as ``progress(images_done, n_images)``.
    """
    recorder = RangeRecorder([model])
    with recorder.recording(), simulate(weights=False, activations=False):
        for done, image in enumerate(data.images, start=1):
            model(**image.inputs(device))
            if progress is not None:
                progress(done, len(data.images))
    recorder.apply(observer)
