"""95 % intervals over images: what another sample of as many images could have given.

Images are resampled, not prompts: the objects of one image are easy or hard together. The mean stays the one over
prompts, so an image counts by its number of prompts. Percentile bootstrap with a fixed seed; needs numpy only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from carsam.errors import DataError

RESAMPLES = 5000
LEVEL = 0.95
SEED = 0
# Indices drawn at once: 32 MB, whatever the number of images.
_CHUNK = 2**22


class Scored(Protocol):
    """An image's name and the IoU of each of its prompts, as :class:`carsam.evaluate.scores.ImageScore` has them."""

    name: str
    ious: Sequence[float]


@dataclass(frozen=True)
class Difference:
    """A paired difference of two models' mean IoU on the images that both were measured on.

    Attributes:
        value: First minus second, in points.
        low, high: The 95 % interval over images.
        n_images, n_prompts: What it rests on; images without prompts do not count.
    """

    value: float
    low: float
    high: float
    n_images: int
    n_prompts: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, float | int]:
        """A plain mapping, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


def mean_interval(groups: Iterable[Sequence[float]]) -> tuple[float, float] | None:
    """The interval of the mean over all values.

    Args:
        groups: The values of each image; empty ones do not count.

    Returns:
        Lower and upper bound; None with fewer than two images, which say nothing about others.
    """
    totals = _totals([np.asarray(group, dtype=np.float64) for group in groups if len(group)])
    return interval_of_means(totals[:, 0], totals[:, 1])


def interval_of_means(
    sums: Sequence[float] | np.ndarray, counts: Sequence[int] | np.ndarray
) -> tuple[float, float] | None:
    """As :func:`mean_interval`, from the sum and the number of each image's values, both ``(images,)``."""
    totals = np.stack([np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)], axis=-1)
    totals = totals[totals[:, 1] > 0]
    if len(totals) < 2:
        return None
    means = np.concatenate([drawn[:, 0] / drawn[:, 1] for drawn in _resampled(totals)])
    return _bounds(means)


def difference_interval(
    scores_a: Iterable[Scored | Mapping[str, Any]], scores_b: Iterable[Scored | Mapping[str, Any]]
) -> Difference | None:
    """How much the mean IoU of one model lies above that of another on the same prompts, with its interval.

    Both means are taken over the same resampled images, so what makes an image hard for both models cancels out.

    Args:
        scores_a: ``per_image`` of one result, as objects or as read from JSON.
        scores_b: Of the other. Images are matched by name, and those that only one result has are left out.

    Returns:
        The first mean minus the second; None with fewer than two images in common.

    Raises:
        DataError: An entry is no image score, or an image was measured with another number of prompts in the other
            result.
    """
    ious_a, ious_b = _by_name(scores_a), _by_name(scores_b)
    names = [name for name in ious_a if name in ious_b and (len(ious_a[name]) or len(ious_b[name]))]
    for name in names:
        if len(ious_a[name]) != len(ious_b[name]):
            raise DataError(
                f"{name[0]} was measured with {len(ious_a[name])} prompts in one result and {len(ious_b[name])} in the "
                "other; a difference needs the same data. Evaluate both models again with the same --coco and boxes."
            )
    if len(names) < 2:
        return None
    a, b = (_totals([ious[name] for name in names]) for ious in (ious_a, ious_b))
    totals = np.stack([a[:, 0] - b[:, 0], a[:, 1]], axis=-1)
    low, high = _bounds(np.concatenate([drawn[:, 0] / drawn[:, 1] for drawn in _resampled(totals)]))
    total, count = totals.sum(axis=0)
    return Difference(float(total / count), low, high, len(names), int(count))


def averaged(results: Sequence[Iterable[Scored | Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The mean of several results on the same prompts, prompt by prompt: of a method over seeds.

    Args:
        results: ``per_image`` of each.

    Raises:
        DataError: An entry is no image score, or two results are not on the same prompts.
    """
    first, *others = [_by_name(scores) for scores in results]
    for other in others:
        if {name: len(ious) for name, ious in other.items()} != {name: len(ious) for name, ious in first.items()}:
            raise DataError("the results to average were measured on different prompts; evaluate them again.")
    means = {name: np.mean([ious, *(other[name] for other in others)], axis=0) for name, ious in first.items()}
    return [{"name": name, "ious": ious.tolist()} for (name, _), ious in means.items()]


def _totals(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Sum and number of each image's values, ``(images, 2)``."""
    return np.array([(group.sum(), len(group)) for group in groups], dtype=np.float64).reshape(-1, 2)


def _resampled(totals: np.ndarray) -> Iterable[np.ndarray]:
    """Sums ``(resamples, 2)`` over as many images drawn with replacement, in parts that fit in memory."""
    random = np.random.default_rng(SEED)
    count = len(totals)
    rows = max(1, _CHUNK // count)
    for start in range(0, RESAMPLES, rows):
        drawn = random.integers(0, count, (min(rows, RESAMPLES - start), count))
        yield np.stack([column[drawn].sum(axis=1) for column in totals.T], axis=-1)


def _bounds(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _by_name(scores: Iterable[Scored | Mapping[str, Any]]) -> dict[tuple[str, int], np.ndarray]:
    """IoUs by name and, where a file lists a name twice, by which time it is."""
    seen: Counter[str] = Counter()
    found = {}
    for score in scores:
        if isinstance(score, Mapping):
            name, ious = score.get("name"), score.get("ious")
        else:
            name, ious = score.name, score.ious
        try:
            values = np.asarray(ious, dtype=np.float64)
        except (TypeError, ValueError):
            values = np.full(1, np.nan)
        if not isinstance(name, str) or values.ndim != 1 or not np.isfinite(values).all():
            raise DataError(f"the scores of the image {name!r} are not a list of numbers; evaluate the model again.")
        found[name, seen[name]] = values
        seen[name] += 1
    return found
