"""The images of a diagnosis, their box prompts, and what their masks are scored against."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as mask_utils
from torch import Tensor
from transformers import SamModel

from carsam.data.coco.checks import check_images
from carsam.data.coco.instances import CocoImage, CocoInstances, Rle, clip_boxes
from carsam.data.images.reading import list_images, read_image
from carsam.data.images.transforms import Geometry, Preprocessor
from carsam.errors import ConfigError, DataError
from carsam.prompts.calibration import MIN_BOX_AREA, CalibrationImage, CalibrationSet
from carsam.prompts.proposals import grid_boxes, propose_boxes

# Prompts decoded at once.
PROMPTS_PER_BATCH = 16
GROUND_TRUTH, FLOAT_MASKS = "ground truth", "float model's masks"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One image with its prompts.

    Attributes:
        name: File name.
        read: Reads the image again, ``(H, W, 3)`` uint8 RGB; photographs are not kept.
        pixel_values: ``(1, 3, S, S)`` float32, preprocessed, on the CPU.
        geometry: How the image lies in the input frame.
        boxes: ``(P, 4)`` float64 XYXY in pixels of the image file, P ≥ 1.
        truth: Masks of the objects in the boxes; None where they are not known.
    """

    name: str
    read: Callable[[], np.ndarray] = field(repr=False)
    pixel_values: Tensor = field(repr=False)
    geometry: Geometry
    boxes: np.ndarray
    truth: tuple[Rle, ...] | None = field(default=None, repr=False)

    @property
    def input_boxes(self) -> Tensor:
        """``(P, 4)`` float32 XYXY in pixels of the input frame."""
        return torch.from_numpy(self.geometry.boxes_to_input(self.boxes)).float()

    def true_mask(self, index: int) -> np.ndarray | None:
        """Mask ``(H, W)`` bool of a prompt's object; None where it is not known."""
        return mask_utils.decode(self.truth[index]).astype(bool) if self.truth is not None else None


def read_samples(
    model: SamModel, folder: str | Path, *, coco: str | Path | None, limit: int, prompts: int
) -> tuple[Sample, ...]:
    """The first usable images of a COCO file, or of a folder by name.

    With a COCO file, its first objects of each image are the prompts (their boxes, clipped to the image) and the truth.
    Without one, prompts are the boxes of the float model's own masks, and of a grid where it finds none.

    Args:
        model: Float model: gives the input size and, without a COCO file, the boxes.
        folder: Image folder.
        coco: COCO instances file.
        limit: Images to use; fewer are used where there are fewer.
        prompts: Box prompts of an image at most.

    Raises:
        ConfigError: ``limit`` or ``prompts`` is below 1.
        DataError: Folder or file are missing or not valid, or no image is usable.
    """
    if limit < 1 or prompts < 1:
        raise ConfigError("a diagnosis needs at least one image and one prompt.")
    source = _annotated(model, coco, folder, limit, prompts) if coco is not None else _proposed(model, folder, prompts)
    samples = []
    for sample in source:
        samples.append(sample)
        if len(samples) == limit:
            break
    if not samples:
        what = f"no image in {coco} has an object with a box of at least {MIN_BOX_AREA:.0f} px²" if coco else None
        raise DataError(f"{what or f'no image in {folder} can be read'}; a diagnosis needs at least one.")
    return tuple(samples)


def calibration_data(samples: tuple[Sample, ...]) -> CalibrationSet:
    """The same images and prompts as a calibration set."""
    images = tuple(CalibrationImage(sample.name, sample.pixel_values, sample.input_boxes) for sample in samples)
    return CalibrationSet(images, skipped=0, fingerprint="")


def _annotated(model: SamModel, coco: str | Path, folder: str | Path, limit: int, prompts: int) -> Iterator[Sample]:
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no image folder {folder}.")
    instances = CocoInstances.from_file(coco)
    preprocess = Preprocessor.for_model(model)
    instances = check_images(instances, _with_objects(instances, limit), folder)
    for image in instances.images:
        boxes, valid = clip_boxes(instances.boxes(image.id), image.size)
        valid &= (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) >= MIN_BOX_AREA
        chosen = np.flatnonzero(valid)[:prompts]
        if not len(chosen):
            continue
        objects = instances.instances(image.id)
        truth = tuple(instances.rle(objects[index], image) for index in chosen)
        read = _coco_reader(instances, image, folder)
        pixel_values, geometry = preprocess(read())
        yield Sample(image.file_name, read, pixel_values, geometry, boxes[chosen], truth)


def _with_objects(instances: CocoInstances, limit: int) -> list[CocoImage]:
    """The first images with an object of a usable size, as far as the file alone tells."""

    def usable(image: CocoImage) -> bool:
        boxes = instances.boxes(image.id)
        if image.height is not None:
            boxes, _ = clip_boxes(boxes, image.size)
        return bool(((boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1) >= MIN_BOX_AREA).any())

    return list(itertools.islice(filter(usable, instances.images), limit))


def _coco_reader(instances: CocoInstances, image: CocoImage, folder: Path) -> Callable[[], np.ndarray]:
    return lambda: instances.read_image(image, folder)


def _proposed(model: SamModel, folder: str | Path, prompts: int) -> Iterator[Sample]:
    preprocess = Preprocessor.for_model(model)
    for path in list_images(folder):
        try:
            pixel_values, geometry = preprocess(read_image(path))
        except DataError as error:
            logger.warning("image skipped: %s", error)
            continue
        boxes = propose_boxes(model, pixel_values, geometry.input_size, prompts)
        if not len(boxes):
            boxes = grid_boxes(geometry.input_size, prompts)
        (height, width), (input_height, input_width) = geometry.original_size, geometry.input_size
        factor = np.array([width / input_width, height / input_height] * 2)
        yield Sample(path.name, _reader(path), pixel_values, geometry, boxes.numpy().astype(np.float64) * factor)


def _reader(path: Path) -> Callable[[], np.ndarray]:
    return lambda: read_image(path)
