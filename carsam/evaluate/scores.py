"""What an evaluation gives, and its JSON; read and written without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from carsam.errors import DataError
from carsam.output.files import write_json
from carsam.reading import read_json

# AP over fewer objects moves by points when a few masks change.
FEW_OBJECTS = 200
MISSING = "-"

# The APs that tables show.
AP_NAMES = {
    "segm_ap": "segm AP",
    "segm_ap50": "segm AP50",
    "segm_ap75": "segm AP75",
    "segm_ap_small": "segm AP, small objects",
    "segm_ap_medium": "segm AP, medium",
    "segm_ap_large": "segm AP, large",
    "box_ap": "box AP",
}


def dice(iou: float) -> float:
    """DSC of a mask from its IoU, both in percent: 2I / (1 + I)."""
    return 200 * iou / (100 + iou)


@dataclass(frozen=True, slots=True)
class ImageScore:
    """One image's result.

    Attributes:
        name: File name.
        mean_iou: Percent, over the image's prompts; None without prompts.
        ious: Percent, per prompt, in the order of the file.
    """

    name: str
    mean_iou: float | None
    ious: tuple[float, ...]


@dataclass(frozen=True)
class CocoResult:
    """Scores over a data set, all in percent.

    Attributes:
        segm_ap: AP of the masks, IoU 0.50:0.95. Every mask counts, also beyond COCO's 100 a class and image.
        box_ap: AP of the masks' tight boxes.
        mean_iou: Over all prompts. With ground-truth boxes, a mask against its own object; with detections, against
            the best-overlapping object of the same category (0 where there is none).
        n_images: Images evaluated, also those without prompts.
        n_prompts: Box prompts.
        per_image: In the order of the file.
        mean_iou_interval: 95 % interval of ``mean_iou`` over images; None with fewer than two images.
        n_objects: Objects of the ground truth, which the APs rest on; None in results of older versions.
        segm_ap50, segm_ap75: AP of the masks at one IoU.
        segm_ap_small, segm_ap_medium, segm_ap_large: AP by the area of the objects' masks (COCO's limits 32² and
            96²); None where no object has such a size.
        box_ap50, box_ap75, box_ap_small, box_ap_medium, box_ap_large: The same for boxes.
        notes: What a reader of the numbers must know, a sentence each.
    """

    segm_ap: float
    box_ap: float
    mean_iou: float
    n_images: int
    n_prompts: int
    per_image: tuple[ImageScore, ...]
    mean_iou_interval: tuple[float, float] | None = None
    n_objects: int | None = None
    segm_ap50: float | None = None
    segm_ap75: float | None = None
    segm_ap_small: float | None = None
    segm_ap_medium: float | None = None
    segm_ap_large: float | None = None
    box_ap50: float | None = None
    box_ap75: float | None = None
    box_ap_small: float | None = None
    box_ap_medium: float | None = None
    box_ap_large: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def dsc(self) -> float:
        """Mean DSC over all prompts, in percent."""
        found = [dice(iou) for score in self.per_image for iou in score.ious]
        return sum(found) / len(found) if found else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings and lists, for JSON."""
        return {
            **asdict(self),
            "per_image": [{**asdict(score), "ious": list(score.ious)} for score in self.per_image],
            "mean_iou_interval": None if self.mean_iou_interval is None else list(self.mean_iou_interval),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, values: Any) -> CocoResult:
        """Reads what :meth:`to_dict` gave, also of older versions and with other keys beside.

        Raises:
            DataError: It is no such mapping; the message names the first key that is missing or no number.
        """
        if not isinstance(values, Mapping):
            raise DataError(f"scores must be a mapping, not {type(values).__name__}; write them with carsam evaluate.")
        numbers = {f.name: _number(values, f.name, needed=False) for f in fields(cls) if f.name.startswith(_NUMBERS)}
        needed = {name: _number(values, name) for name in ("segm_ap", "box_ap", "mean_iou")}
        counts = {name: int(_number(values, name)) for name in ("n_images", "n_prompts")}
        objects = _number(values, "n_objects", needed=False)
        notes = values.get("notes")
        return cls(
            **{**numbers, **needed, **counts},
            per_image=tuple(_image_score(entry) for entry in _list(values, "per_image")),
            mean_iou_interval=_interval(values.get("mean_iou_interval")),
            n_objects=None if objects is None else int(objects),
            notes=tuple(note for note in notes if isinstance(note, str)) if isinstance(notes, list) else (),
        )

    def save(self, path: str | Path) -> None:
        """Writes JSON; an existing file is replaced at once or not at all."""
        write_json(path, self.to_dict())

    def __str__(self) -> str:
        interval = "" if self.mean_iou_interval is None else f" ({interval_text(self.mean_iou_interval)})"
        return (
            f"segm AP {self.segm_ap:.1f}, box AP {self.box_ap:.1f}, mean IoU {self.mean_iou:.1f}{interval} "
            f"({self.n_prompts} box prompts, {self.n_images} images)"
        )


# Beginnings of the names of those fields that hold a score or None.
_NUMBERS = ("segm_ap", "box_ap")


def read_float_scores(path: str | Path) -> CocoResult:
    """Scores of a float model: what ``carsam evaluate FLOAT --json FILE`` wrote, or a ``results.json`` that holds them.

    Raises:
        DataError: The file is missing, damaged, or holds no such scores.
    """
    path = Path(path)
    fix = "write it with carsam evaluate FLOAT --json FILE"
    values = read_json(path, fix)
    if "segm_ap" not in values:
        if "float_evaluation" not in values:
            raise DataError(f"{path} holds no scores of a float model; {fix}.")
        values = values["float_evaluation"]
    try:
        return CocoResult.from_dict(values)
    except DataError as error:
        raise DataError(f"{path} cannot be used: {error}") from error


def few_objects_note(n_objects: int) -> str | None:
    """The sentence to put beside an AP that rests on few objects; None where there are enough."""
    if n_objects >= FEW_OBJECTS:
        return None
    objects = "1 object" if n_objects == 1 else f"{n_objects} objects"
    return f"AP rests on {objects}; with fewer than {FEW_OBJECTS} it is noisy, so compare mean IoU."


def score_text(value: float | None, places: int = 1) -> str:
    """A score for a table; ``-`` where there is none."""
    return MISSING if value is None else f"{value:.{places}f}"


def interval_text(interval: tuple[float, float] | None, places: int = 1) -> str:
    """``36.1 to 42.0``; ``-`` where there is none."""
    return MISSING if interval is None else f"{interval[0]:.{places}f} to {interval[1]:.{places}f}"


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _number(values: Mapping[str, Any], key: str, *, needed: bool = True) -> float | None:
    found = _finite(values.get(key))
    if found is None and needed:
        raise DataError(f"the scores have no number under {key!r}; write them with carsam evaluate.")
    return found


def _list(values: Mapping[str, Any], key: str) -> list[Any]:
    found = values.get(key)
    if not isinstance(found, list):
        raise DataError(f"the scores have no list under {key!r}; write them with carsam evaluate.")
    return found


def _interval(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = map(_finite, value)
    return None if low is None or high is None else (low, high)


def _image_score(entry: Any) -> ImageScore:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise DataError("the scores have an image without a name under 'per_image'; write them with carsam evaluate.")
    ious = [_finite(iou) for iou in _list(entry, "ious")]
    if None in ious:
        raise DataError(
            f"the scores of {entry['name']} hold an IoU that is no number; write them with carsam evaluate."
        )
    return ImageScore(entry["name"], _number(entry, "mean_iou", needed=False), tuple(ious))
