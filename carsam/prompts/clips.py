"""Calibration data with time: short clips with objects to follow, from videos or from still images that move."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from carsam.data.images.transforms import Geometry, Preprocessor
from carsam.data.video.dataset import AnnotatedVideo, find_videos, holds_videos
from carsam.errors import ConfigError
from carsam.models.sites import Sites
from carsam.prompts.calibration import CalibrationSet, calibration_set
from carsam.prompts.image import PromptedImage

# Frames of a clip: at the last one, SAM 2's memory attention reads all seven of its maps for the first time.
FRAMES = 8
# How many maps memory attention reads on the frames that a clip gives its calibration: mostly all of them, as on all
# but the first frames of a video; few of them too, since then each gets more attention.
AGES = (7, 1, 7, 3)


@dataclass(frozen=True)
class PromptedClip(PromptedImage):
    """A short clip; its first frame is the image, whose boxes show the objects.

    Attributes:
        frames: ``(T, 3, S, S)`` float32, preprocessed, on the CPU; the first one is ``pixel_values``.
        masks: ``(N, S, S)`` bool, objects on the first frame; None where boxes show them.
        age: How many of its maps the memory holds on the frame that calibrates reading it; that is the last one used.
        tracked: The mask decoder is calibrated on frames whose objects come from memory; with boxes otherwise.
    """

    frames: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    masks: Tensor | None = field(default=None, repr=False)
    age: int = AGES[0]
    tracked: bool = True

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        masks = () if self.masks is None else (self.masks.float(),)
        return (*super().tensors, self.frames, *masks)


def as_clips(data: CalibrationSet, move: Callable[[Tensor, int, int], Tensor], frames: int = FRAMES) -> CalibrationSet:
    """Every image of a set as a clip; those that are clips already stay.

    Three of four clips calibrate the decoder with what comes from memory, the fourth with boxes.

    Args:
        data: The set.
        move: Called with an image ``(1, 3, S, S)``, a seed and the number of frames; gives the frames.
        frames: Of a clip.
    """
    if all(isinstance(image, PromptedClip) for image in data.images):
        return data
    clips = []
    for index, image in enumerate(data.images):
        if not isinstance(image, PromptedClip):
            moving = move(image.pixel_values, index, frames)
            fields = (image.name, image.pixel_values, image.boxes, image.geometry, image.image_boxes, image.truth)
            image = PromptedClip(
                *fields, frames=moving, age=AGES[index % len(AGES)], tracked=index % len(AGES) != len(AGES) - 1
            )
        clips.append(image)
    return CalibrationSet.of(clips, data.skipped)


def data_for(
    model: PreTrainedModel,
    sites: Sites,
    images: str | Path,
    *,
    n_images: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> CalibrationSet:
    """Calibration data from a folder of images, or clips from a data set of videos where the model has a memory.

    Args:
        model: Gives the input frame.
        sites: Its sites.
        images: The folder.
        n_images: Images, or clips.
        seed: Of all choices.
        progress: Called with how many are done and how many are wanted.
        **settings: Of :func:`carsam.prompts.calibration.calibration_set`.
    """
    if sites.memory_stages and holds_videos(images):
        return clip_set(model, images, n_clips=n_images, seed=seed, progress=progress)
    return calibration_set(model, images, n_images=n_images, seed=seed, progress=progress, **settings)


def clip_set(
    model: PreTrainedModel,
    root: str | Path,
    *,
    n_clips: int = 16,
    frames: int = FRAMES,
    step: int = 2,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationSet:
    """Clips of real videos with masks, for calibration.

    Args:
        model: Gives the input frame.
        root: A data set of videos in DAVIS's or SA-V's form.
        n_clips: Clips to cut out; videos are used in turn.
        frames: Of a clip.
        step: Every how many frames of the video.
        seed: Of where clips begin.
        progress: Called with clips done and clips wanted.

    Raises:
        ConfigError: A setting is out of range.
        DataError: The videos cannot be used; see :func:`carsam.data.video.dataset.find_videos`.
    """
    if min(n_clips, step) < 1 or frames < 2:
        raise ConfigError("n_clips and step must be at least 1, and a clip needs at least 2 frames.")
    data, preprocessor = find_videos(root), Preprocessor.for_model(model)
    rng = random.Random(seed)
    clips = []
    for index in range(n_clips):
        video = data.open(data.names[index % len(data.names)])
        clips.append(_cut(video, preprocessor, index, frames, step, rng))
        if progress is not None:
            progress(index + 1, n_clips)
    return CalibrationSet.of(clips)


def _cut(
    video: AnnotatedVideo, preprocessor: Preprocessor, index: int, frames: int, step: int, rng: random.Random
) -> PromptedClip:
    """A clip that begins on a frame with a mask of an object that is there."""
    last = max(0, len(video.video) - 1 - (frames - 1) * step)
    starts = [start for start in sorted({i for o in video.objects for i in o.masks}) if start <= last] or [0]
    rng.shuffle(starts)
    for start in starts:
        inside = [mask for mask in video.masks(start).values() if mask.any()]
        if inside:
            break
    chosen = range(start, len(video.video), step)[:frames]
    tensors = [preprocessor(video.video.frame(i)) for i in chosen]
    geometry = tensors[0][1]
    boxes = np.array([_box(mask) for mask in inside], dtype=np.float64)
    moving = torch.cat([tensor for tensor, _ in tensors])
    return PromptedClip(
        f"{video.name}/{video.video.names[start]}",
        moving[:1].clone(),
        torch.from_numpy(geometry.boxes_to_input(boxes)).float(),
        geometry,
        boxes,
        frames=moving,
        masks=torch.stack([to_input(torch.from_numpy(mask), geometry, preprocessor.image_size) for mask in inside]),
        age=AGES[index % len(AGES)],
        tracked=index % len(AGES) != len(AGES) - 1,
    )


def _box(mask: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def to_input(mask: Tensor, geometry: Geometry, side: int) -> Tensor:
    """A mask (H, W) bool in the input frame, (S, S) bool: as sam2 resizes it, with antialiasing and cut at one half."""
    height, width = geometry.input_size
    values = mask[None, None].float()
    values = F.interpolate(values, (height, width), mode="bilinear", align_corners=False, antialias=True)
    return F.pad(values >= 0.5, (0, side - width, 0, side - height))[0, 0]
