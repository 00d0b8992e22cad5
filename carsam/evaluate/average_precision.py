"""COCO's average precision by pycocotools, without its cap of 100 detections a class and image.

A box prompt gives one mask, so a picture with 300 objects has 300 masks that must all count. Categories are evaluated
one at a time: the values are the same, and neither memory nor time grows with images × categories.
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.cocoeval import COCOeval

from carsam.data.coco.annotations import Rle
from carsam.data.coco.ground_truth import TrueObject

OFFICIAL_CAP = 100
KINDS = ("segm", "box")
# Positions in pycocotools' precision: IoU thresholds 0.50, 0.75; area ranges all, small, medium, large.
_AT_50, _AT_75 = 0, 5
_AREAS = {"": 0, "_small": 1, "_medium": 2, "_large": 3}


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predicted mask and its score; image and category as in :class:`TrueObject`."""

    image: int
    category: int
    mask: Rle
    score: float


@dataclass(frozen=True)
class Precision:
    """Average precisions in percent.

    Attributes:
        values: By name: ``segm_ap``, ``segm_ap50``, ``segm_ap75``, ``segm_ap_small``, ``segm_ap_medium``,
            ``segm_ap_large``, and the same with ``box_``. None where no object counts.
        capped: ``segm_ap`` and ``box_ap`` under COCO's cap of 100 detections a class and image; None where nothing
            lies beyond it.
    """

    values: dict[str, float | None]
    capped: dict[str, float | None] | None


def average_precision(objects: Iterable[TrueObject], predictions: Iterable[Prediction]) -> Precision:
    """Average precision of masks and of their tight boxes.

    Args:
        objects: Ground truth, crowds included.
        predictions: Masks with scores.
    """
    truth: dict[int, list[TrueObject]] = defaultdict(list)
    for item in objects:
        truth[item.category].append(item)
    found: dict[int, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        # Without an object of its category, a mask changes no AP.
        if prediction.category in truth:
            found[prediction.category].append(prediction)

    sums: dict[str, list[float]] = defaultdict(list)
    capped: dict[str, list[float]] = defaultdict(list)
    beyond = False
    for category, items in truth.items():
        for kind in KINDS:
            evaluation = _CategoryEvaluation(items, found[category], kind)
            precision = evaluation.run()
            beyond |= evaluation.exceeds_cap
            for suffix, area in _AREAS.items():
                _append(sums[f"{kind}_ap{suffix}"], precision[:, :, 0, area, -1])
            _append(sums[f"{kind}_ap50"], precision[_AT_50, :, 0, 0, -1])
            _append(sums[f"{kind}_ap75"], precision[_AT_75, :, 0, 0, -1])
            _append(capped[f"{kind}_ap"], precision[:, :, 0, 0, 0])
    return Precision(_means(sums), _means(capped) if beyond else None)


def _append(values: list[float], precision: np.ndarray) -> None:
    # pycocotools marks a category without objects (of that size) by -1.
    if (precision > -1).all():
        values.append(float(precision.mean()))


def _means(values: dict[str, list[float]]) -> dict[str, float | None]:
    return {name: 100 * float(np.mean(found)) if found else None for name, found in values.items()}


class _CategoryEvaluation(COCOeval):
    """pycocotools' evaluation of one category, on the images that have it.

    Args:
        objects: Ground truth of the category.
        predictions: Its predictions.
        kind: ``segm`` or ``box``.
    """

    def __init__(self, objects: Sequence[TrueObject], predictions: Sequence[Prediction], kind: str):
        super().__init__(None, None, "segm" if kind == "segm" else "bbox")
        # pycocotools takes a match with id 0 for no match, so ids start at 1.
        self._truth = [
            {"id": i, "image_id": o.image, "category_id": 0, "segmentation": o.mask, "bbox": list(o.box)}
            | {"area": o.area, "iscrowd": int(o.crowd), "ignore": int(o.crowd)}
            for i, o in enumerate(objects, 1)
        ]
        self._found = [_detection(i, p, kind) for i, p in enumerate(predictions, 1)]
        counts: dict[int, int] = defaultdict(int)
        for prediction in predictions:
            counts[prediction.image] += 1
        most = max(counts.values(), default=0)
        self.exceeds_cap = most > OFFICIAL_CAP
        self.params.maxDets = [OFFICIAL_CAP, most] if self.exceeds_cap else [OFFICIAL_CAP]
        self.params.catIds = [0]
        self.params.imgIds = sorted({entry["image_id"] for entry in self._truth + self._found})

    def run(self) -> np.ndarray:
        """Precision ``(10 IoU thresholds, 101 recalls, 1, 4 areas, caps)``; -1 where there are no objects."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.evaluate()
            self.accumulate()
        return self.eval["precision"]

    def _prepare(self) -> None:
        # Everything is at hand already; pycocotools would go through its own COCO objects.
        self._gts, self._dts = defaultdict(list), defaultdict(list)
        for kept, entries in ((self._gts, self._truth), (self._dts, self._found)):
            for entry in entries:
                kept[entry["image_id"], 0].append(entry)

    def evaluateImg(self, imgId: int, catId: int, aRng: Sequence[float], maxDet: int) -> dict[str, Any] | None:
        """Matches one image's masks with its objects as pycocotools does, but looks only at pairs that overlap enough.

        pycocotools compares every mask with every object in Python, at each threshold: minutes for a few thousand
        objects in one image.
        """
        truth, found = self._gts[imgId, catId], self._dts[imgId, catId]
        if not truth and not found:
            return None
        outside = [entry["area"] < aRng[0] or entry["area"] > aRng[1] for entry in truth]
        ignored = np.array([bool(entry["ignore"]) or out for entry, out in zip(truth, outside)], dtype=bool)
        order = np.argsort(ignored, kind="mergesort")
        truth, ignored = [truth[i] for i in order], ignored[order]
        best_first = np.argsort([-entry["score"] for entry in found], kind="mergesort")[:maxDet]
        found = [found[i] for i in best_first]

        thresholds = [min(t, 1 - 1e-10) for t in self.params.iouThrs]
        matches = np.zeros((len(thresholds), len(found)))
        to_ignored = np.zeros((len(thresholds), len(found)), dtype=bool)
        if truth and found:
            overlaps = np.asarray(self.ious[imgId, catId])[:, order]
            for at, threshold in enumerate(thresholds):
                taken: set[int] = set()
                rows, columns = np.nonzero(overlaps[: len(found)] >= threshold)
                for row, candidates in _grouped(rows, columns):
                    match = _best_match(overlaps[row], candidates, ignored, taken, truth)
                    if match is not None:
                        taken.add(match)
                        matches[at, row], to_ignored[at, row] = truth[match]["id"], ignored[match]
        # A mask of another size that matches nothing is no false alarm of this size.
        other_size = np.array([entry["area"] < aRng[0] or entry["area"] > aRng[1] for entry in found], dtype=bool)
        return {
            "dtScores": [entry["score"] for entry in found],
            "dtMatches": matches,
            "dtIgnore": to_ignored | ((matches == 0) & other_size[None]),
            "gtIgnore": ignored.astype(int),
        }


def _grouped(rows: np.ndarray, columns: np.ndarray) -> Iterable[tuple[int, list[int]]]:
    """Columns of each row, both ascending."""
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(rows)]):
        yield int(rows[start]), columns[start:end].tolist()


def _best_match(
    overlaps: np.ndarray, candidates: list[int], ignored: np.ndarray, taken: set[int], truth: list[dict[str, Any]]
) -> int | None:
    """The object that a mask belongs to: an object that counts before one that does not, then the largest overlap."""
    best = None
    for index in candidates:
        if index in taken and not truth[index]["iscrowd"]:
            continue
        if best is not None and ignored[index] and not ignored[best]:
            break
        if best is None or overlaps[index] >= overlaps[best]:
            best = index
    return best


def _detection(index: int, prediction: Prediction, kind: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": index, "image_id": prediction.image, "category_id": 0, "score": prediction.score}
    if kind == "segm":
        return {**entry, "segmentation": prediction.mask, "area": float(mask_utils.area(prediction.mask))}
    box = mask_utils.toBbox(prediction.mask).tolist()
    return {**entry, "bbox": box, "area": box[2] * box[3]}
