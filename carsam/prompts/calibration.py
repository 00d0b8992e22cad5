"""The calibration set: unlabelled images, each with box prompts (METHOD.md, 2)."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import SamModel

from carsam.data.coco.checks import check_calibration_boxes, log_respelled, oriented
from carsam.data.coco.instances import CocoImage, CocoInstances, clean_boxes
from carsam.data.images.file import read_header
from carsam.data.images.folder import ImageFolder, locate
from carsam.data.images.reading import SkippedImage, list_images, log_skipped, read_image, require_images
from carsam.data.images.transforms import Geometry, Preprocessor
from carsam.data.notes import Notes
from carsam.errors import ConfigError, DataError
from carsam.prompts.proposals import grid_boxes, propose_boxes

# Smaller objects are noise at SAM's resolution of one mask cell for 4 × 4 input pixels.
MIN_BOX_AREA = 100.0
# Boxes of an image whose size the file leaves out are clipped when its header is read.
UNKNOWN_SIZE = (10**9, 10**9)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationImage:
    """One image with its prompts.

    Attributes:
        name: File name.
        pixel_values: ``(1, 3, S, S)`` float32, preprocessed, on the CPU.
        boxes: ``(P, 4)`` float32 XYXY in pixels of the input frame, P ≥ 1.
    """

    name: str
    pixel_values: Tensor
    boxes: Tensor

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Arguments of ``SamModel`` for a pass with all boxes as prompts and one mask each."""
        return {
            "pixel_values": self.pixel_values.to(device),
            "input_boxes": self.boxes[None].to(device),
            "multimask_output": False,
        }


@dataclass(frozen=True)
class CalibrationSet:
    """The images that a quantization sees.

    Attributes:
        images: In the order of the seeded choice.
        skipped: Images that were chosen but missing or unreadable.
        fingerprint: SHA-256 over pixels and boxes; equal fingerprints mean equal data.
    """

    images: tuple[CalibrationImage, ...]
    skipped: int
    fingerprint: str


def calibration_set(
    model: SamModel,
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
            pixels, source = candidate.read(notes)
        except DataError as error:
            skipped.append(SkippedImage(candidate.path, str(error)))
            continue
        pixel_values, geometry = preprocess(pixels)
        rng = random.Random(f"{seed}/{candidate.path.name}")
        boxes = source(pixel_values, geometry, boxes_per_image, rng)
        chosen.append(CalibrationImage(candidate.path.name, pixel_values, boxes))
        if progress is not None:
            progress(len(chosen), min(n_images, len(candidates)))

    log_skipped(skipped, "calibration images")
    notes.log(logger, len(chosen), "calibration images")
    require_images(len(chosen), minimum, skipped, where=str(images))
    if len(chosen) < n_images:
        logger.warning("%d calibration images instead of %d: there are no more usable ones.", len(chosen), n_images)
    return CalibrationSet(tuple(chosen), len(skipped), _fingerprint(chosen))


# Boxes of an image: from (pixel_values, geometry, count, rng) to (P, 4) float32 in the input frame.
BoxSource = Callable[[Tensor, Geometry, int, random.Random], Tensor]


@dataclass(frozen=True)
class _Candidate:
    """An image that may be chosen: ``read`` gives its pixels ``(H, W, 3)`` and where its boxes come from."""

    path: Path
    read: Callable[[Notes], tuple[np.ndarray, BoxSource]]


def _folder_candidates(model: SamModel, folder: str | Path, box_source: str) -> list[_Candidate]:
    def auto(pixel_values: Tensor, geometry: Geometry, count: int, rng: random.Random) -> Tensor:
        found = propose_boxes(model, pixel_values, geometry.input_size, count)
        return torch.cat([found, grid_boxes(geometry.input_size, count - len(found))])

    def grid(pixel_values: Tensor, geometry: Geometry, count: int, rng: random.Random) -> Tensor:
        return grid_boxes(geometry.input_size, count)

    source = auto if box_source == "auto" else grid
    return [_unannotated(path, source) for path in list_images(folder)]


def _unannotated(path: Path, source: BoxSource) -> _Candidate:
    return _Candidate(path, lambda notes: (read_image(path, notes=notes), source))


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
    """Different boxes ``(N, 4)`` XYXY of an image, clipped to it where its size is known, of a usable area."""
    boxes, _ = clean_boxes(instances.boxes(image.id), image.size if image.height is not None else UNKNOWN_SIZE)
    boxes = np.unique(boxes, axis=0)
    return boxes[(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) >= MIN_BOX_AREA]


def _annotated(instances: CocoInstances, image: CocoImage, folder: ImageFolder) -> _Candidate:
    def read(notes: Notes) -> tuple[np.ndarray, BoxSource]:
        if image.path is None:
            raise DataError(f"there is no image {folder.folder / image.file_name}.")
        header = read_header(image.path)
        known = oriented(image, image.path, header, instances.annotations[image.id], notes)
        pixels = read_image(image.path, apply_exif=known.upright is not False, notes=notes)
        boxes = _usable_boxes(instances, known)
        if not len(boxes):
            raise DataError(f"{image.path} has no object with a box of at least {MIN_BOX_AREA:.0f} px² inside it.")

        def choose(pixel_values: Tensor, geometry: Geometry, count: int, rng: random.Random) -> Tensor:
            chosen = sorted(rng.sample(range(len(boxes)), min(count, len(boxes))))
            return torch.from_numpy(geometry.boxes_to_input(boxes[chosen])).float()

        return pixels, choose

    return _Candidate(image.path or folder.folder / image.file_name, read)


def _fingerprint(images: list[CalibrationImage]) -> str:
    digest = hashlib.sha256()
    for image in images:
        for tensor in (image.pixel_values, image.boxes):
            array = np.ascontiguousarray(tensor.numpy(), dtype="<f4")
            digest.update(f"{array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()
