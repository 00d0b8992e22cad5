"""Calibration without reconstruction: ranges of all activation sites from the float model in one pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from carsam.calibrate.observers import RangeRecorder
from carsam.models.family import family_of
from carsam.prompts.calibration import CalibrationSet
from carsam.quantizers import simulate


def calibrate(
    model: nn.Module,
    data: CalibrationSet,
    observer: str,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Sets the range of every activation site to what the observer makes of the float activations.

    Args:
        model: A model with quantized layers; runs in floating point here.
        data: Calibration images with boxes.
        observer: Name of the observer.
        progress: Called as ``progress(images_done, n_images)``.
    """
    recorder = RangeRecorder([model])
    with recorder.recording(), simulate(weights=False, activations=False):
        family = family_of(model)
        for done, image in enumerate(data.images, start=1):
            family.forward(model, image)
            if progress is not None:
                progress(done, len(data.images))
    recorder.apply(observer)
