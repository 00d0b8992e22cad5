"""Files of predictions: PNG masks, an overlay, npz, and COCO instances. Each appears whole or not at all."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from carsam.data.coco.polygons import mask_to_polygons
from carsam.errors import ConfigError
from carsam.output.files import whole_file, write_text
from carsam.predict.inputs import Photo, shown
from carsam.predict.masks import FoundMask

FORMATS = ("png", "overlay", "npz", "coco")
COCO_NAME = "predictions.json"


def read_formats(values: Iterable[str]) -> tuple[str, ...]:
    """Formats from repeated or comma-separated values, each once.

    Raises:
        ConfigError: One is unknown.
    """
    formats = [part.strip().lower() for value in values for part in value.split(",")]
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(f"--format {name!r} is unknown; choose from {', '.join(FORMATS)}.")
    return tuple(dict.fromkeys(formats))


def mask_name(stem: Path, mask: FoundMask) -> Path:
    """Name of a mask's PNG file."""
    choice = "" if mask.choice is None else f"_{mask.choice}"
    return stem.with_name(f"{stem.name}_mask_{mask.number}{choice}.png")


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Writes a PNG file.

    Raises:
        CarsamError: The disk is full, or the place is not writable.
    """
    with whole_file(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def write_mask(path: Path, mask: FoundMask) -> None:
    """Writes a mask as PNG: 255 inside, 0 outside.

    Raises:
        CarsamError: See :func:`write_picture`.
    """
    write_picture(path, mask.pixels.astype(np.uint8) * np.uint8(255))


def write_npz(path: Path, masks: Sequence[FoundMask], size: tuple[int, int]) -> None:
    """Writes all masks of an image as arrays for ``numpy.load``, one mask in memory at a time.

    The arrays are ``masks`` ``(N, H, W)`` bool, ``predicted_iou`` ``(N,)``, ``number`` ``(N,)`` of the prompts, from 1,
    and ``boxes`` ``(N, 4)``, XYXY around each mask.

    Raises:
        CarsamError: See :func:`write_picture`.
    """
    boxes = [(x, y, x + width, y + height) for x, y, width, height in (mask.box for mask in masks)]
    arrays = {
        "predicted_iou": np.array([mask.predicted_iou for mask in masks], dtype=np.float32),
        "number": np.array([mask.number for mask in masks], dtype=np.int64),
        "boxes": np.array(boxes, dtype=np.int64).reshape(-1, 4),
    }
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        _add(archive, "masks", (len(masks), *size), bool, lambda file: [file.write(m.pixels.tobytes()) for m in masks])
        for name, array in arrays.items():
            _add(archive, name, array.shape, array.dtype, lambda file, array=array: file.write(array.tobytes()))


def _add(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: Any, write: Callable[[IO[bytes]], Any]
) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        write(file)


@dataclass
class CocoFile:
    """A COCO instances file that grows by images.

    Attributes:
        polygons: Segmentations are polygons instead of RLE.
        empty: Masks without a pixel, which have no place in the file.
    """

    polygons: bool
    empty: int = 0
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    categories: dict[Any, str] = field(default_factory=dict)

    def add(self, photo: Photo, image_id: Any, masks: Sequence[FoundMask]) -> None:
        """Adds an image with its masks.

        Args:
            photo: The image.
            image_id: Its id where the prompts came from COCO; else it gets the next number.
            masks: Its masks.
        """
        image_id = len(self.images) + 1 if image_id is None else image_id
        name = shown(photo.subfolder / photo.path.name)
        if any(image["file_name"] == name for image in self.images):
            name = shown(photo.path.resolve())  # images of one name, from two folders
        self.images.append({"id": image_id, "file_name": name, "height": photo.size[0], "width": photo.size[1]})
        for mask in masks:
            if not mask.area:
                self.empty += 1
                continue
            category, label = mask.prompt.category or (1, "object")
            self.categories[category] = label
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": list(mask.box),
                    "area": mask.area,
                    "segmentation": mask_to_polygons(mask.pixels) if self.polygons else mask.rle,
                    "iscrowd": 0,
                    "score": mask.predicted_iou,
                }
            )

    def write(self, path: Path) -> None:
        """Writes the file.

        Raises:
            CarsamError: See :func:`write_picture`.
        """
        categories = [{"id": key, "name": name} for key, name in sorted(self.categories.items())]
        content = {"images": self.images, "annotations": self.annotations, "categories": categories}
        write_text(path, json.dumps(content, allow_nan=False) + "\n")
