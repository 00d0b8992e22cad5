"""The images of a diagnosis: the first usable ones of a COCO file, with their masks, or of a folder."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from carsam.data.coco.annotations import CocoImage
from carsam.data.coco.checks import check_images
from carsam.data.coco.instances import CocoInstances
from carsam.data.images.reading import list_images, read_image
from carsam.data.images.transforms import Preprocessor
from carsam.errors import ConfigError, DataError
from carsam.prompts.image import MIN_BOX_AREA, PromptedImage, object_boxes
from carsam.prompts.proposals import grid_boxes, propose_boxes

GROUND_TRUTH, FLOAT_MASKS = "ground truth", "float model's masks"

logger = logging.getLogger(__name__)


def diagnosis_images(
    model: PreTrainedModel, folder: str | Path, *, coco: str | Path | None, limit: int, prompts: int
) -> tuple[PromptedImage, ...]:
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
    images = tuple(itertools.islice(source, limit))
    if not images:
        what = f"no image in {coco} has an object with a box of at least {MIN_BOX_AREA:.0f} px²" if coco else None
        raise DataError(f"{what or f'no image in {folder} can be read'}; a diagnosis needs at least one.")
    return images


def _annotated(
    model: PreTrainedModel, coco: str | Path, folder: str | Path, limit: int, prompts: int
) -> Iterator[PromptedImage]:
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no image folder {folder}.")
    instances = CocoInstances.from_file(coco)
    preprocess = Preprocessor.for_model(model)
    instances = check_images(instances, _with_objects(instances, limit), folder)
    for image in instances.images:
        boxes, usable = object_boxes(instances, image)
        chosen = np.flatnonzero(usable)[:prompts]
        if not len(chosen):
            continue
        objects = instances.instances(image.id)
        truth = tuple(instances.rle(objects[index], image) for index in chosen)
        read = _coco_reader(instances, image, folder)
        pixel_values, geometry = preprocess(read())
        yield PromptedImage.with_image_boxes(
            image.file_name, pixel_values, geometry, boxes[chosen], truth=truth, read=read
        )


def _with_objects(instances: CocoInstances, limit: int) -> list[CocoImage]:
    """The first images with an object of a usable size, as far as the file alone tells."""
    usable = (image for image in instances.images if object_boxes(instances, image)[1].any())
    return list(itertools.islice(usable, limit))


def _coco_reader(instances: CocoInstances, image: CocoImage, folder: Path) -> Callable[[], np.ndarray]:
    return lambda: instances.read_image(image, folder)


def _proposed(model: PreTrainedModel, folder: str | Path, prompts: int) -> Iterator[PromptedImage]:
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
        yield PromptedImage.with_input_boxes(path.name, pixel_values, geometry, boxes, read=_reader(path))


def _reader(path: Path) -> Callable[[], np.ndarray]:
    return lambda: read_image(path)
