"""What fell and what rose: every prompt of an evaluation beside the same prompt of the float model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from carsam.errors import DataError
from carsam.evaluate.intervals import Difference, difference_interval
from carsam.evaluate.scores import FEW_OBJECTS, few_objects_note
from carsam.report import numbers
from carsam.report.order import entries, numbers_of
from carsam.report.source import Source

_MOST = 5
# In points; masks that differ by a few pixels are alike.
_HARDLY = 1.0
# Intervals for more images would take the report longer than all the rest.
_MOST_IMAGES = 200_000


@dataclass(frozen=True)
class Change:
    """A prompt or an image, with its IoU (or mean IoU) in percent.

    Attributes:
        image: File name.
        prompt: Number of the prompt in its image, from 1; None for the whole image.
        before, after: The IoU of the float and of the quantized model.
    """

    image: str
    prompt: int | None
    before: float
    after: float

    @property
    def change(self) -> float:
        """Quantized minus float."""
        return self.after - self.before


@dataclass(frozen=True)
class Changes:
    """What quantization changed, by prompts and images.

    Attributes:
        difference: How mean IoU changed, with its interval; None with fewer than two images.
        n_fell, n_rose, n_alike: Prompts by their IoU; alike is a change of less than a point.
        fell, rose: The prompts that changed most, the largest change first.
        images: Those whose mean IoU fell most, the largest change first.
    """

    difference: Difference | None
    n_fell: int
    n_rose: int
    n_alike: int
    fell: tuple[Change, ...]
    rose: tuple[Change, ...]
    images: tuple[Change, ...]


def find_changes(evaluation: dict[str, Any], floating: dict[str, Any]) -> Changes | None:
    """Compares two evaluations prompt by prompt.

    Args:
        evaluation, floating: Scores of the quantized and of the float model, as ``results.json`` has them.

    Returns:
        None where they are not of the same prompts, or hold no IoU of single prompts.
    """
    mine, other = (entries(scores.get("per_image")) for scores in (evaluation, floating))
    if not mine or len(mine) > _MOST_IMAGES or not all(map(_is_score, (*mine, *other))):
        return None
    if [image["name"] for image in mine] != [image["name"] for image in other]:
        return None
    try:
        difference = difference_interval(mine, other)
    except DataError:  # other numbers of prompts
        return None
    prompts, images = [], []
    for own, theirs in zip(mine, other):
        pairs = zip(numbers_of(theirs.get("ious")), numbers_of(own.get("ious")))
        found = [Change(str(own.get("name")), index, *map(float, pair)) for index, pair in enumerate(pairs, 1)]
        prompts += found
        if found:
            before, after = (sum(getattr(each, key) for each in found) / len(found) for key in ("before", "after"))
            images.append(Change(found[0].image, None, before, after))
    if not prompts:
        return None
    by_change = sorted(prompts, key=lambda each: each.change)
    fell = [each for each in by_change if each.change <= -_HARDLY]
    rose = [each for each in reversed(by_change) if each.change >= _HARDLY]
    worst = sorted((each for each in images if each.change <= -_HARDLY), key=lambda each: each.change)
    return Changes(
        difference,
        len(fell),
        len(rose),
        len(prompts) - len(fell) - len(rose),
        tuple(fell[:_MOST]),
        tuple(rose[:_MOST]),
        tuple(worst[:_MOST]),
    )


def _is_score(image: dict[str, Any]) -> bool:
    ious = [numbers.finite(iou) for iou in numbers_of(image.get("ious"))]
    return isinstance(image.get("name"), str) and all(iou is not None and 0 <= iou <= 100 for iou in ious)


def notes(source: Source) -> list[str]:
    """What a reader of the scores must know, a sentence each."""
    found = [note for note in numbers_of(source.evaluation.get("notes")) if isinstance(note, str)]
    objects = n_objects(source)
    note = few_objects_note(round(objects)) if objects is not None else None
    if note and not any(each.startswith("AP rests on") for each in found):
        found.append(note)
    return found[:10]


def n_objects(source: Source) -> float | None:
    """Objects that AP rests on; None where it was not measured. Older results have no count: then every prompt."""
    if numbers.finite(source.evaluation.get("segm_ap")) is None:
        return None
    known = numbers.finite(source.evaluation.get("n_objects"))
    prompts = None if source.evaluation.get("boxes") else numbers.finite(source.evaluation.get("n_prompts"))
    found = known if known is not None else prompts
    return found if found is not None and found >= 0 else None


def few_objects(source: Source) -> int | None:
    """Objects that AP rests on where they are few, so that it is noisy; else None."""
    found = n_objects(source)
    return round(found) if found is not None and found < FEW_OBJECTS else None
