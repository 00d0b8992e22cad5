"""The calibration set: unlabelled images, each with box prompts (METHOD.md, 2)."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from carsam.data.coco.annotations import CocoImage
from carsam.data.coco.checks import check_calibration_boxes, log_respelled, oriented
from carsam.data.coco.instances import CocoInstances
from carsam.data.images.file import read_header
from carsam.data.images.folder import ImageFolder, locate
from carsam.data.images.reading import SkippedImage, list_images, log_skipped, read_image, require_images
from carsam.data.images.transforms import Geometry, Preprocessor
from carsam.data.notes import Notes
from carsam.errors import ConfigError, DataError
from carsam.prompts.image import MIN_BOX_AREA, PromptedImage, object_boxes
from carsam.prompts.proposals import grid_boxes, propose_boxes

logger = logging.getLogger(__name__)


CalibrationImage = PromptedImage  # its public name


@dataclass(frozen=True)
class CalibrationSet:
    """The images that a quantization sees.

    Attributes:
        images: In the order of the seeded choice.
        skipped: Images that were chosen but missing or unreadable.
        fingerprint: SHA-256 over pixels and boxes; equal fingerprints mean equal data.
        embeddings: Of the images, by the model that they are there for, in single or half precision; None where they
            are not known.
    """

    images: tuple[CalibrationImage, ...]
    skipped: int
    fingerprint: str
    embeddings: tuple[Tensor | None, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, images: Sequence[CalibrationImage], skipped: int = 0) -> CalibrationSet:
        """A set of these images, with their fingerprint."""
        return cls(tuple(images), skipped, _fingerprint(images))

    def embedding(self, index: int) -> Tensor | None:
        """An image's embedding in single precision; None where it is not known."""
        found = self.embeddings[index] if index < len(self.embeddings) else None
        return None if found is None else found.float()

    def with_first_embeddings(self, found: Sequence[Tensor]) -> CalibrationSet:
        """The set with embeddings of its first images, one by one."""
        return replace(self, embeddings=(*found, *self.embeddings[len(found) :]))

    def with_embeddings(self, known: Sequence[tuple[Tensor, Tensor]]) -> CalibrationSet:
        """The set with embeddings of those images whose very pixels are among ``known``, with their embeddings."""
        by_pixels = {id(pixels): embedding for pixels, embedding in known}
        return replace(self, embeddings=tuple(by_pixels.get(id(image.pixel_values)) for image in self.images))


def calibration_set(
    model: PreTrainedModel,
    images: str | Path,
    *,
    coco: str | Path | None = None,
    n_images: int = 32,
    boxes_per_image: int = 6,
    seed: int = 0,
    box_source: str = "auto",
    minimum: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationSet:
    """Chooses and reads calibration images.

    With a COCO file, images that have an object of at least 100 px² (box area, no crowd) are candidates, and their
    boxes are the prompts. Without one, all images of the folder are candidates, and boxes come from the model's own
    masks on a grid of points (``auto``, filled up from the grid where it finds too few) or from a grid (``grid``).

    Candidates are sorted by name, then shuffled with the seed; unreadable ones are skipped and replaced by the next.
    The boxes chosen for an image depend on the seed and its name only.

    Args:
        model: Gives the input size and, for ``auto``, the masks. Not changed.
        images: Folder of images.
        coco: COCO instances file.
        n_images: Images to use; fewer are used where there are fewer.
        boxes_per_image: Box prompts of an image at most.
        seed: Of all choices.
        box_source: ``auto`` or ``grid``; of no effect with ``coco``.
        minimum: Images that must be usable.
        progress: Called with images done and images wanted.

    Raises:
        ConfigError: A setting is out of range.
        DataError: Folder or file are missing or not valid, or fewer than ``minimum`` images are usable.
    """
    if min(n_images, boxes_per_image, minimum) < 1 or minimum > n_images:
        raise ConfigError("n_images, boxes_per_image and minimum must be at least 1, and minimum at most n_images.")
    if box_source not in ("auto", "grid"):
        raise ConfigError(f"unknown box source {box_source!r}; choose auto or grid.")

    candidates = _coco_candidates(coco, images) if coco is not None else _folder_candidates(model, images, box_source)
    random.Random(seed).shuffle(candidates)

    preprocess = Preprocessor.for_model(model)
    chosen: list[CalibrationImage] = []
    skipped: list[SkippedImage] = []
    notes = Notes()
    for candidate in candidates:
        if len(chosen) == n_images:
            break
        try:
            pixels, prompt = candidate.read(notes)
        except DataError as error:
            skipped.append(SkippedImage(candidate.path, str(error)))
            continue
        pixel_values, geometry = preprocess(pixels)
        rng = random.Random(f"{seed}/{candidate.path.name}")
        chosen.append(prompt(candidate.path.name, pixel_values, geometry, boxes_per_image, rng))
        if progress is not None:
            progress(len(chosen), min(n_images, len(candidates)))

    log_skipped(skipped, "calibration images")
    notes.log(logger, len(chosen), "calibration images")
    require_images(len(chosen), minimum, skipped, where=str(images))
    if len(chosen) < n_images:
        logger.warning("%d calibration images instead of %d: there are no more usable ones.", len(chosen), n_images)
    return CalibrationSet.of(chosen, len(skipped))


# Gives an image its prompts: from (name, pixel_values, geometry, count, rng).
Prompter = Callable[[str, Tensor, Geometry, int, random.Random], PromptedImage]


@dataclass(frozen=True)
class _Candidate:
    """An image that may be chosen: ``read`` gives its pixels ``(H, W, 3)`` and what finds its prompts."""

    path: Path
    read: Callable[[Notes], tuple[np.ndarray, Prompter]]


def _folder_candidates(model: PreTrainedModel, folder: str | Path, box_source: str) -> list[_Candidate]:
    def prompt(name: str, pixel_values: Tensor, geometry: Geometry, count: int, rng: random.Random) -> PromptedImage:
        size = geometry.input_size
        found = propose_boxes(model, pixel_values, size, count) if box_source == "auto" else torch.zeros(0, 4)
        boxes = torch.cat([found, grid_boxes(size, count - len(found))])
        return PromptedImage.with_input_boxes(name, pixel_values, geometry, boxes)

    return [_unannotated(path, prompt) for path in list_images(folder)]


def _unannotated(path: Path, prompt: Prompter) -> _Candidate:
    return _Candidate(path, lambda notes: (read_image(path, notes=notes), prompt))


def _coco_candidates(coco: str | Path, folder: str | Path) -> list[_Candidate]:
    images = ImageFolder(folder)
    instances = CocoInstances.from_file(coco)
    candidates = [_annotated(instances, image, images) for image in _with_boxes(instances, images)]
    check_calibration_boxes(instances)
    if not candidates:
        raise DataError(f"no image in {coco} has an object with a box of at least {MIN_BOX_AREA:.0f} px².")
    return candidates


def _with_boxes(instances: CocoInstances, folder: ImageFolder) -> Iterator[CocoImage]:
    """The images with a usable box, sorted by name, with their files where they are there.

    Raises:
        DataError: None of them is there.
    """
    usable = [image for image in instances.images if len(_usable_boxes(instances, image))]
    found, respelled = locate(usable, folder, instances.path, some_missing=True)
    log_respelled(respelled, found, len(usable))
    for image in sorted(usable, key=lambda i: i.file_name):
        yield replace(image, path=found.get(image.id))


def _usable_boxes(instances: CocoInstances, image: CocoImage) -> np.ndarray:
    """Different usable boxes ``(N, 4)`` XYXY of an image's objects."""
    boxes, usable = object_boxes(instances, image)
    return np.unique(boxes[usable], axis=0)


def _annotated(instances: CocoInstances, image: CocoImage, folder: ImageFolder) -> _Candidate:
    def read(notes: Notes) -> tuple[np.ndarray, Prompter]:
        if image.path is None:
            raise DataError(f"there is no image {folder.folder / image.file_name}.")
        header = read_header(image.path)
        known = oriented(image, image.path, header, instances.annotations[image.id], notes)
        pixels = read_image(image.path, apply_exif=known.upright is not False, notes=notes)
        boxes = _usable_boxes(instances, known)
        if not len(boxes):
            raise DataError(f"{image.path} has no object with a box of at least {MIN_BOX_AREA:.0f} px² inside it.")

        def prompt(
            name: str, pixel_values: Tensor, geometry: Geometry, count: int, rng: random.Random
        ) -> PromptedImage:
            chosen = sorted(rng.sample(range(len(boxes)), min(count, len(boxes))))
            return PromptedImage.with_image_boxes(name, pixel_values, geometry, boxes[chosen])

        return pixels, prompt

    return _Candidate(image.path or folder.folder / image.file_name, read)


def _fingerprint(images: Sequence[CalibrationImage]) -> str:
    digest = hashlib.sha256()
    for image in images:
        for tensor in image.tensors:
            array = np.ascontiguousarray(tensor.numpy(), dtype="<f4")
            digest.update(f"{array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()
