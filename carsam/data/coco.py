"""COCO instance annotations and detection results, checked when read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from carsam.data.images import read_image
from carsam.errors import DataError

Rle = dict[str, Any]


@dataclass(frozen=True)
class CocoImage:
    """An entry of ``images``."""

    id: int
    file_name: str
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """``(h, w)``."""
        return self.height, self.width


@dataclass(frozen=True)
class CocoInstances:
    """An instances file.

    Attributes:
        path: Where it was read.
        images: In the order of the file.
        annotations: By image id, in the order of the file; every image has an entry. Annotations of images that the
            file does not list are left out, as pycocotools does.
        categories: ``{"id", "name", ...}``; those that only annotations mention are added.
    """

    path: Path
    images: tuple[CocoImage, ...]
    annotations: dict[int, tuple[dict[str, Any], ...]]
    categories: tuple[dict[str, Any], ...]

    @classmethod
    def from_file(cls, path: str | Path) -> CocoInstances:
        """Reads and checks an instances file.

        Raises:
            DataError: The file is missing, is not JSON, or lacks what an instances file has.
        """
        path = Path(path)
        data = _read_json(path)
        if isinstance(data, list):
            raise DataError(
                f"{path} is a list, as detection results are; give the annotation file (images, annotations)."
            )
        missing = [key for key in ("images", "annotations") if not isinstance(data, dict) or key not in data]
        if missing:
            raise DataError(f"{path} has no {' and no '.join(map(repr, missing))}; a COCO instances file is needed.")

        images = tuple(_image(entry, i, path) for i, entry in enumerate(_list(data, "images", path)))
        by_image: dict[int, list[dict[str, Any]]] = {image.id: [] for image in images}
        if len(by_image) != len(images):
            raise DataError(f"{path} lists an image id twice; image ids must be unique.")
        for i, annotation in enumerate(_list(data, "annotations", path)):
            _require(annotation, ("image_id", "category_id", "bbox"), f"annotation {i}", path)
            _check_bbox(annotation["bbox"], f"annotation {i}", path)
            if annotation["image_id"] in by_image:
                by_image[annotation["image_id"]].append(annotation)

        categories = {c["id"]: c for c in data.get("categories", ()) if isinstance(c, dict) and "id" in c}
        for annotation in (a for group in by_image.values() for a in group):
            category = annotation["category_id"]
            categories.setdefault(category, {"id": category, "name": str(category)})
        return cls(path, images, {k: tuple(v) for k, v in by_image.items()}, tuple(categories.values()))

    def image(self, image_id: int) -> CocoImage:
        """An image by its id.

        Raises:
            DataError: The file has no such image.
        """
        for image in self.images:
            if image.id == image_id:
                return image
        raise DataError(f"{self.path} has no image with id {image_id}.")

    def instances(self, image_id: int) -> tuple[dict[str, Any], ...]:
        """Annotations of single objects: those that are not crowds."""
        return tuple(a for a in self.annotations[image_id] if not a.get("iscrowd", 0))

    def boxes(self, image_id: int) -> np.ndarray:
        """Boxes of :meth:`instances`, ``(N, 4)`` XYXY float64 in pixels of the image, as the file has them."""
        return xywh_to_xyxy([a["bbox"] for a in self.instances(image_id)])

    def masks(self, image_id: int) -> np.ndarray:
        """Masks of :meth:`instances`, ``(N, H, W)`` bool.

        Raises:
            DataError: An annotation has no usable segmentation.
        """
        image = self.image(image_id)
        rles = [self.rle(a, image) for a in self.instances(image_id)]
        if not rles:
            return np.zeros((0, *image.size), dtype=bool)
        return mask_utils.decode(rles).transpose(2, 0, 1).astype(bool)

    def rle(self, annotation: dict[str, Any], image: CocoImage) -> Rle:
        """An annotation's segmentation (polygons, plain or compressed RLE) as compressed RLE.

        Raises:
            DataError: There is none, or it does not fit the image.
        """
        where = f"annotation {annotation.get('id', '?')} of image {image.file_name!r} in {self.path}"
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, dict) and "counts" in segmentation and "size" in segmentation:
            if segmentation["size"] != list(image.size):
                raise DataError(f"{where} has a mask of size {segmentation['size']}, not {list(image.size)}.")
        elif not isinstance(segmentation, list) or not segmentation:
            raise DataError(f"{where} has no segmentation; masks need polygons or RLE.")
        try:
            rle = _to_rle(segmentation, image)
            # pycocotools notices RLE that runs over the image's end only here; its other functions trust it.
            mask_utils.decode(rle)
            return rle
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{where} has a segmentation that cannot be read: {error}") from error

    def read_image(self, image: CocoImage, folder: str | Path) -> np.ndarray:
        """Reads an image in the orientation that the annotations use: ``(H, W, 3)`` uint8 RGB.

        Raises:
            DataError: The file is missing or unreadable, or has another size than the annotations say.
        """
        path = Path(folder) / image.file_name
        pixels = read_image(path)
        if pixels.shape[:2] != image.size:
            # Some annotation tools ignore the EXIF orientation; the noted size tells.
            pixels = read_image(path, apply_exif=False)
        if pixels.shape[:2] != image.size:
            raise DataError(
                f"{path} is {pixels.shape[0]} × {pixels.shape[1]} pixels (height × width), but {self.path.name} says "
                f"{image.height} × {image.width}; use the images that were annotated."
            )
        return pixels


@dataclass(frozen=True)
class Detection:
    """An entry of a detection-results file; ``bbox`` is XYWH in pixels of the image."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    score: float


def load_detections(path: str | Path) -> tuple[Detection, ...]:
    """Reads COCO detection results, ``[{image_id, category_id, bbox XYWH, score}, ...]``.

    Raises:
        DataError: The file is missing, is not JSON, is no such list, is empty, or has an entry that is not valid.
    """
    path = Path(path)
    data = _read_json(path)
    if not isinstance(data, list):
        raise DataError(f"{path} is not a list of detections; a COCO results file is needed, not an annotation file.")
    if not data:
        raise DataError(f"{path} holds no detections.")
    detections = []
    for i, entry in enumerate(data):
        where = f"detection {i}"
        _require(entry, ("image_id", "category_id", "bbox", "score"), where, path)
        _check_bbox(entry["bbox"], where, path)
        if not _is_number(entry["score"]):
            raise DataError(f"{where} in {path} has the score {entry['score']!r}; a finite number is needed.")
        box = tuple(float(v) for v in entry["bbox"])
        detections.append(Detection(entry["image_id"], entry["category_id"], box, float(entry["score"])))
    return tuple(detections)


def xywh_to_xyxy(boxes: Iterable[Iterable[float]]) -> np.ndarray:
    """Boxes ``(N, 4)`` XYWH as XYXY, float64."""
    boxes = np.array([list(b) for b in boxes], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def clip_boxes(boxes: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Clips boxes to an image and tells which have an area inside it.

    Args:
        boxes: ``(N, 4)`` XYXY in pixels.
        size: ``(h, w)`` of the image.

    Returns:
        Clipped boxes ``(N, 4)`` and their validity ``(N,)`` bool; boxes that are not finite are not valid.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    finite = np.isfinite(boxes).all(axis=1)
    height, width = size
    clipped = np.where(finite[:, None], boxes, 0.0).clip(0, [width, height, width, height])
    return clipped, finite & (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])


def clean_boxes(boxes: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Clips boxes to an image and drops those without area or entirely outside.

    Args:
        boxes: ``(N, 4)`` XYXY in pixels.
        size: ``(h, w)`` of the image.

    Returns:
        The kept boxes ``(K, 4)`` in their order, and the number dropped.
    """
    clipped, valid = clip_boxes(boxes, size)
    return clipped[valid], int((~valid).sum())


def _to_rle(segmentation: list[Any] | Rle, image: CocoImage) -> Rle:
    if isinstance(segmentation, list):
        # A polygon of four numbers would be taken for a box by pycocotools.
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not polygons:
            raise ValueError("a polygon needs at least three points")
        return mask_utils.merge(mask_utils.frPyObjects(polygons, image.height, image.width))
    if isinstance(segmentation["counts"], list):
        if sum(segmentation["counts"]) != image.height * image.width:
            raise ValueError(f"the RLE counts {sum(segmentation['counts'])} pixels")
        return mask_utils.frPyObjects(segmentation, image.height, image.width)
    return segmentation


def _read_json(path: Path) -> Any:
    if not path.exists():
        raise DataError(f"there is no file {path}.")
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the COCO JSON file itself.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); is the file complete?") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _list(data: dict[str, Any], key: str, path: Path) -> list[Any]:
    if not isinstance(data[key], list):
        raise DataError(f"{key!r} in {path} must be a list.")
    return data[key]


def _require(entry: Any, keys: tuple[str, ...], where: str, path: Path) -> None:
    missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise DataError(f"{where} in {path} has no {', '.join(map(repr, missing))}.")
    for key in ("id", "image_id", "category_id"):
        if key in keys and not isinstance(entry[key], (int, str)):
            raise DataError(f"{where} in {path} has the {key} {entry[key]!r}; a whole number is needed.")


def _image(entry: Any, index: int, path: Path) -> CocoImage:
    where = f"image {index}"
    _require(entry, ("id", "file_name", "height", "width"), where, path)
    if not all(isinstance(entry[k], int) and entry[k] > 0 for k in ("height", "width")):
        raise DataError(f"{where} in {path} has no positive whole height and width.")
    return CocoImage(entry["id"], str(entry["file_name"]), entry["height"], entry["width"])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_bbox(bbox: Any, where: str, path: Path) -> None:
    if not isinstance(bbox, (list, tuple)) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise DataError(f"{where} in {path} has the bbox {bbox!r}; four finite numbers x, y, width, height are needed.")
