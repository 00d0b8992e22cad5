"""The masks of one image, kept as run lengths: at full size there is one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from carsam.data.coco.rle import counts_area, counts_box, counts_to_mask, counts_to_rle, mask_to_counts
from carsam.predict.automatic_masks import SamAutomaticMaskGenerator
from carsam.predict.predictor import SamPredictor
from carsam.predict.prompts import Prompt


@dataclass(frozen=True)
class FoundMask:
    """A mask and where it comes from.

    Attributes:
        counts: Run lengths over the image.
        size: ``(h, w)`` of the image.
        predicted_iou: The model's own judgement.
        number: Of the prompt, or of the mask where everything is segmented; from 1.
        choice: 1 to 3 where a prompt gives three masks, else None.
        best: Whether it is the only mask of its prompt, or the best by predicted IoU.
        prompt: What showed the object; the point of the grid where everything is segmented.
        stability: Stability score, where everything is segmented.
    """

    counts: np.ndarray
    size: tuple[int, int]
    predicted_iou: float
    number: int
    choice: int | None
    best: bool
    prompt: Prompt
    stability: float | None = None

    @property
    def pixels(self) -> np.ndarray:
        """``(H, W)`` bool, made anew."""
        return counts_to_mask(self.counts, self.size)

    @property
    def area(self) -> int:
        """In pixels."""
        return counts_area(self.counts)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Tight box as x, y, width, height."""
        return counts_box(self.counts, self.size)

    @property
    def rle(self) -> dict[str, Any]:
        """COCO's compressed RLE."""
        return counts_to_rle(self.counts, self.size)


def segment_prompts(predictor: SamPredictor, prompts: Sequence[Prompt], multimask: bool) -> Iterator[FoundMask]:
    """Masks of every prompt on the image that the predictor holds.

    Args:
        predictor: With the image set.
        prompts: In pixels of the image.
        multimask: All three masks of a prompt. Otherwise one; a single point is ambiguous and gets the best of three.
    """
    geometry = predictor.geometry
    for number, prompt in enumerate(prompts, 1):
        ambiguous = prompt.box is None and len(prompt.points) == 1
        low_res, iou = predictor.predict_low_res(
            point_coords=np.array([p[:2] for p in prompt.points]) if prompt.points else None,
            point_labels=np.array([p[2] for p in prompt.points]) if prompt.points else None,
            box=np.array(prompt.box) if prompt.box is not None else None,
            multimask_output=multimask or ambiguous,
        )
        best = int(iou[0].argmax())
        for i in range(iou.shape[1]) if multimask else [best]:
            logits = geometry.masks_to_original(low_res[0, i], predictor.preprocessor.image_size)
            mask = (logits > predictor.mask_threshold).cpu().numpy()
            del logits
            yield FoundMask(
                mask_to_counts(mask),
                predictor.original_size,
                float(iou[0, i]),
                number,
                i + 1 if multimask else None,
                i == best,
                prompt,
            )


def segment_everything(generator: SamAutomaticMaskGenerator, image: np.ndarray) -> Iterator[FoundMask]:
    """Masks of everything in an image, the best first.

    Args:
        generator: With ``output_mode`` ``uncompressed_rle``.
        image: ``(H, W, 3)`` uint8 RGB.
    """
    for number, record in enumerate(generator.generate(image), 1):
        ((x, y),) = record["point_coords"]
        yield FoundMask(
            np.array(record["segmentation"]["counts"]),
            image.shape[:2],
            record["predicted_iou"],
            number,
            None,
            True,
            Prompt(points=((x, y, 1),)),
            record["stability_score"],
        )


def describe(mask: FoundMask, files: Mapping[str, str]) -> dict[str, Any]:
    """A mask for ``--json``."""
    prompt = mask.prompt
    record: dict[str, Any] = {"number": mask.number}
    if mask.choice is not None:
        record["choice"] = mask.choice
    if prompt.box is not None:
        record["box_prompt"] = list(prompt.box)
    if prompt.points:
        record["points"] = [list(point[:2]) for point in prompt.points]
        record["labels"] = [point[2] for point in prompt.points]
    if prompt.annotation is not None:
        record["annotation_id"] = prompt.annotation
    record |= {"predicted_iou": mask.predicted_iou}
    if mask.stability is not None:
        record["stability_score"] = mask.stability
    return record | {"area": mask.area, "bbox": list(mask.box), **files}
