"""COCO detection results: the boxes and scores of a detector."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carsam.data.coco.annotations import Id, read_bbox, read_id, shown
from carsam.data.coco.json_file import read_json
from carsam.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Detection:
    """An entry of a detection-results file; ``bbox`` is XYWH in pixels of the image."""

    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]
    score: float


def load_detections(path: str | Path) -> tuple[Detection, ...]:
    """Reads COCO detection results, ``[{image_id, category_id, bbox XYWH, score}, ...]``.

    Raises:
        DataError: The file is missing, is not JSON, is no such list, is empty, or has an entry that is not valid.
    """
    path = Path(path)
    data = read_json(path)
    if not isinstance(data, list):
        raise DataError(f"{path} is not a list of detections; a COCO results file is needed, not an annotation file.")
    if not data:
        raise DataError(f"{path} holds no detections.")
    return tuple(_detection(entry, f"detection {i} in {path}") for i, entry in enumerate(data))


def _detection(entry: Any, where: str) -> Detection:
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {shown(entry)}, not an object with its fields.")
    missing = [key for key in ("image_id", "category_id", "bbox", "score") if key not in entry]
    if missing:
        raise DataError(f"{where} has no {', '.join(map(repr, missing))}.")
    score = entry["score"]
    if type(score) not in (int, float) or not math.isfinite(score if type(score) is float else 0) or abs(score) > 1e30:
        raise DataError(f"{where} has the score {shown(score)}; a finite number is needed.")
    return Detection(
        read_id(entry["image_id"], "image_id", where),
        read_id(entry["category_id"], "category_id", where),
        read_bbox(entry["bbox"], where),
        float(score),
    )
