"""segment-anything without torchvision.

Meta's package imports torchvision for four small functions but does not need it otherwise, and torchvision has no
wheel for every PyTorch build that carsam supports. Where the real one imports, it is used; elsewhere the four
functions below stand in for it while segment-anything is imported. They leave ``sys.modules`` again afterwards, so that
other packages (transformers asks whether torchvision is there) are not misled.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """PIL image to (height, width), bilinear with PIL's antialiasing, as torchvision does for PIL images."""
    height, width = size
    return image.resize((width, height), Image.Resampling.BILINEAR)


def to_pil_image(array: np.ndarray) -> Image.Image:
    """(height, width, 3) uint8 to PIL."""
    return Image.fromarray(array)


def box_area(boxes: Tensor) -> Tensor:
    """(N, 4) boxes as x1, y1, x2, y2 to (N,) areas."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression within each class ``idxs``; kept indexes by falling score."""
    order = scores.argsort(descending=True, stable=True)
    areas = box_area(boxes)
    kept = []
    while order.numel():
        best, rest = order[0], order[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[rest, :2])
        high = torch.minimum(boxes[best, 2:], boxes[rest, 2:])
        overlap = (high - low).clamp(min=0).prod(dim=1)
        iou = overlap / (areas[best] + areas[rest] - overlap)
        order = rest[(iou <= iou_threshold) | (idxs[rest] != idxs[best])]
    return torch.stack(kept) if kept else order


def _stand_ins() -> dict[str, ModuleType]:
    names = ("", ".transforms", ".transforms.functional", ".ops", ".ops.boxes")
    modules = {f"torchvision{name}": ModuleType(f"torchvision{name}") for name in names}
    for name, module in modules.items():
        module.__path__ = []  # marks it as a package, so that `import torchvision.ops.boxes` goes on to the child
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    functional, boxes = modules["torchvision.transforms.functional"], modules["torchvision.ops.boxes"]
    functional.resize, functional.to_pil_image = resize, to_pil_image
    boxes.batched_nms, boxes.box_area = batched_nms, box_area
    return modules


def import_segment_anything() -> ModuleType:
    """The ``segment_anything`` package, with the stand-ins where torchvision does not import.

    Raises:
        ImportError: segment-anything itself is not installed.
    """
    try:
        importlib.import_module("torchvision.ops")
    except (ImportError, RuntimeError):  # RuntimeError: a torchvision built for another PyTorch
        stand_ins = _stand_ins()
    else:
        stand_ins = {}
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("segment_anything")
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)
