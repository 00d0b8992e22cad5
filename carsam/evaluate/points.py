"""Interactive evaluation: mean IoU after 1, 3 and 5 simulated clicks (METHOD.md, 11)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pycocotools import mask as mask_utils
from scipy import ndimage
from torch import Tensor
from transformers import PreTrainedModel

from carsam.data.coco.ground_truth import GroundTruth
from carsam.data.images.transforms import Geometry, Preprocessor
from carsam.errors import ConfigError, DataError
from carsam.evaluate.coco_metrics import Progress, evaluating, naming_what_is_kept, require_finite
from carsam.evaluate.intervals import interval_of_means
from carsam.evaluate.journal import Journals, evaluation_parts
from carsam.output.files import write_json
from carsam.predict.predictor import encode_image, predict_logits

if TYPE_CHECKING:
    from carsam.run.embeddings import Embeddings

# Of all masks of a batch: a few of these at a byte a pixel are in memory at once.
MAX_BATCH_PIXELS = 2**28


@dataclass(frozen=True)
class PointImageScore:
    """One image's result.

    Attributes:
        name: File name.
        mean_iou: Percent over the image's objects, by number of clicks; empty without objects.
        n_objects: Objects clicked.
    """

    name: str
    mean_iou: dict[int, float]
    n_objects: int = 0


@dataclass(frozen=True)
class PointResult:
    """Scores over a data set.

    Attributes:
        mean_iou: Percent over all objects, by number of clicks.
        n_images: Images evaluated.
        n_prompts: Objects.
        per_image: In the order of the file.
        mean_iou_interval: 95 % interval over images, by number of clicks; None with fewer than two images.
    """

    mean_iou: dict[int, float]
    n_images: int
    n_prompts: int
    per_image: tuple[PointImageScore, ...]
    mean_iou_interval: dict[int, tuple[float, float] | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings and lists, for JSON (which turns the numbers of clicks into text)."""
        return {**asdict(self), "per_image": [asdict(score) for score in self.per_image]}

    def save(self, path: str | Path) -> None:
        """Writes JSON; an existing file is replaced at once or not at all."""
        write_json(path, self.to_dict())

    def __str__(self) -> str:
        scores = ", ".join(f"{iou:.1f} at {n} click{'s' if n > 1 else ''}" for n, iou in self.mean_iou.items())
        return f"mean IoU {scores} ({self.n_prompts} objects, {self.n_images} images)"


def evaluate_points(
    model: PreTrainedModel,
    coco_file: str | Path,
    image_folder: str | Path,
    *,
    clicks: tuple[int, ...] = (1, 3, 5),
    device: str | torch.device | None = None,
    limit: int | None = None,
    prompts_per_batch: int = 16,
    progress: Progress | None = None,
    journals: Journals | None = None,
    embeddings: Embeddings | None = None,
) -> PointResult:
    """Simulates a user who clicks where the mask is most wrong.

    The first click is the point of the object farthest from its boundary. Every further click is the point farthest
    from the boundary of the wrong region, over missed pixels (a positive click) and surplus ones (a negative click),
    whichever lies deeper (the protocol of RITM and of SAM's evaluation). One click is ambiguous, so the first answer
    is the best of three masks by predicted IoU; later ones are the single mask, with the last low-resolution logits
    as mask prompt, as SAM was trained.

    Args:
        model: Float or quantized.
        coco_file: COCO instances; crowds are no objects.
        image_folder: Folder that the file names are relative to.
        clicks: Numbers of clicks to score.
        device: Where to run; the model goes back to its device afterwards. None leaves it where it is.
        limit: Only the file's first images.
        prompts_per_batch: Objects handled at once.
        progress: Called with (images done, images) after each image.
        journals: Where finished images are kept and taken from; None keeps nothing.
        embeddings: Where image embeddings are kept and taken from; None computes them. The scores are the same.

    Raises:
        ConfigError: ``clicks`` is empty, or a number is below 1.
        CheckpointError: The model gives values that are not finite.
        DataError: A file is missing or not valid, images are missing, or there is no object.
        DeviceError: The device is not available.
    """
    if not clicks or min(clicks) < 1 or prompts_per_batch < 1:
        raise ConfigError(f"clicks ({clicks}) and prompts_per_batch ({prompts_per_batch}) must be numbers from 1.")
    clicks = tuple(sorted(set(clicks)))
    truth = GroundTruth.from_file(coco_file, image_folder, limit)
    preprocess = Preprocessor.for_model(model)

    tables: list[np.ndarray] = []
    with evaluating(model, device), embeddings.serving(model) if embeddings else nullcontext():
        journal = None
        if journals is not None:
            settings = {"limit": limit, "clicks": clicks, "prompts_per_batch": prompts_per_batch}
            files = {"annotation file": coco_file}
            parts = evaluation_parts(model, "points", files, preprocessing=str(preprocess), **settings)
            journal = journals.open(parts, len(truth.images))
        for index in range(len(truth.images)):
            path = truth.image_path(index)
            kept = journal.get(index, path) if journal is not None else None
            if kept is not None:
                tables.append(np.array(kept, dtype=np.float64).reshape(len(clicks), -1))
            else:
                with naming_what_is_kept(journal):
                    tables.append(_click_image(model, preprocess, truth, index, clicks, prompts_per_batch))
                if journal is not None:
                    journal.add(index, path, tables[-1].tolist())
            if progress is not None:
                progress(index + 1, len(truth.images))
    return _result(truth, clicks, tables)


def _click_image(
    model: PreTrainedModel,
    preprocess: Preprocessor,
    truth: GroundTruth,
    index: int,
    clicks: tuple[int, ...],
    prompts_per_batch: int,
) -> np.ndarray:
    """IoU in percent ``(len(clicks), objects)`` of an image."""
    # An empty mask (an annotation slip) has no point to click.
    objects = [item.mask for item in truth.singles(index) if item.area > 0]
    if not objects:
        return np.zeros((len(clicks), 0))
    pixel_values, geometry = preprocess(truth.read_image(index))
    embeddings = encode_image(model, pixel_values)
    session = _Session(model, embeddings, geometry, preprocess.image_size, truth.images[index].file_name)
    height, width = truth.images[index].size
    count = max(1, min(prompts_per_batch, MAX_BATCH_PIXELS // (height * width)))
    columns = []
    for start in range(0, len(objects), count):
        masks = mask_utils.decode(objects[start : start + count]).transpose(2, 0, 1).astype(bool)
        columns.append(session.run(list(masks), clicks))
    return np.concatenate(columns, axis=1)


def _result(truth: GroundTruth, clicks: tuple[int, ...], tables: list[np.ndarray]) -> PointResult:
    table = np.concatenate(tables, axis=1)
    if not table.shape[1]:
        raise DataError(f"every object in {truth.instances.path} has an empty mask, so there is nothing to click.")
    scores = tuple(
        PointImageScore(image.file_name, dict(zip(clicks, t.mean(axis=1).tolist())) if t.size else {}, t.shape[1])
        for image, t in zip(truth.images, tables)
    )
    counts = [t.shape[1] for t in tables]
    sums = np.array([t.sum(axis=1) for t in tables])
    intervals = {n: interval_of_means(sums[:, i], counts) for i, n in enumerate(clicks)}
    mean_iou = dict(zip(clicks, table.mean(axis=1).tolist()))
    return PointResult(mean_iou, len(tables), table.shape[1], scores, intervals)


@dataclass(frozen=True)
class _Session:
    """One image, ready for clicks."""

    model: PreTrainedModel
    embeddings: Tensor
    geometry: Geometry
    image_size: int
    name: str

    def run(self, targets: list[np.ndarray], clicks: tuple[int, ...]) -> np.ndarray:
        """IoU in percent ``(len(clicks), B)`` for masks ``(H, W)``."""
        points = np.zeros((len(targets), 0, 2))
        labels = np.zeros((len(targets), 0), dtype=np.int64)
        masks = [np.zeros_like(target) for target in targets]
        logits: Tensor | None = None
        table = []
        for n in range(1, max(clicks) + 1):
            # A mask without error gets its last click again: all prompts of a batch need as many points.
            found = [
                next_click(t, m) or (tuple(p[-1]), int(q[-1])) for t, m, p, q in zip(targets, masks, points, labels)
            ]
            points = np.concatenate([points, np.array([p for p, _ in found], dtype=np.float64)[:, None]], axis=1)
            labels = np.concatenate([labels, np.array([q for _, q in found])[:, None]], axis=1)
            logits = self._predict(points, labels, logits)
            masks = [(self.geometry.masks_to_original(m, self.image_size) > 0).cpu().numpy() for m in logits[:, 0]]
            if n in clicks:
                table.append([100 * mask_iou(m, t) for m, t in zip(masks, targets)])
        return np.array(table)

    def _predict(self, points: np.ndarray, labels: np.ndarray, previous: Tensor | None) -> Tensor:
        low_res, iou = predict_logits(
            self.model,
            self.embeddings,
            points=torch.from_numpy(self.geometry.points_to_input(points)).float(),
            labels=torch.from_numpy(labels),
            masks=previous,
            multimask_output=previous is None,
        )
        require_finite(self.name, low_res, iou)
        best = iou.argmax(dim=1)
        return low_res[torch.arange(len(best), device=best.device), best][:, None]


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """IoU (0..1) of boolean masks ``(H, W)``; 1 where both are empty."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def next_click(target: np.ndarray, mask: np.ndarray) -> tuple[tuple[float, float], int] | None:
    """The click that corrects a mask most.

    Args:
        target: ``(H, W)`` bool, what the user wants.
        mask: ``(H, W)`` bool, what the model gave; empty before the first click.

    Returns:
        The point (x, y) in pixels and its label (1 for a missed region, 0 for a surplus one), or None if the mask is
        the target.
    """
    missed, missed_depth = deepest_point(target & ~mask)
    surplus, surplus_depth = deepest_point(mask & ~target)
    if missed_depth == surplus_depth == 0:
        return None
    return (missed, 1) if missed_depth >= surplus_depth else (surplus, 0)


def deepest_point(region: np.ndarray) -> tuple[tuple[float, float], float]:
    """The pixel of a region ``(H, W)`` farthest from its boundary: (x, y) and its distance, 0 for an empty region."""
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    if not len(rows):
        return (0.0, 0.0), 0.0
    top, left = rows[0], columns[0]
    distance = distance_to_boundary(region[top : rows[-1] + 1, left : columns[-1] + 1])
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return (float(left + x), float(top + y)), float(distance[y, x])


def distance_to_boundary(region: np.ndarray) -> np.ndarray:
    """Euclidean distance in pixels of each pixel of a region to the nearest pixel outside it, exact.

    Everything beyond the array is outside.

    Args:
        region: ``(H, W)`` bool.

    Returns:
        ``(H, W)`` float64, 0 outside the region.
    """
    return ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
