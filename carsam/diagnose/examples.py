"""Masks of both models scored image by image, and the pictures of the worst and the median image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from carsam.data.images.transforms import Geometry
from carsam.diagnose.measures import entropy, focus_overlap, kl_divergence
from carsam.diagnose.passes import Outcome
from carsam.diagnose.pictures import SUFFIX, heat_picture, mask_picture, zoom_picture, zoom_region
from carsam.diagnose.results import Example, HeatMap, PromptScore, Zoom
from carsam.evaluate.points import mask_iou
from carsam.prompts.image import PromptedImage

WORST, MEDIAN = "worst", "median"
# An object with a smaller share of the image is hard to see on all of it.
SMALL_SHARE = 0.02
MAX_ZOOMS = 3
Pictures = dict[str, Image.Image]


@dataclass(frozen=True)
class Scored:
    """An image with its results and scores."""

    sample: PromptedImage
    outcome: Outcome
    prompts: tuple[PromptScore, ...]

    @property
    def means(self) -> tuple[float, float]:
        """Mean IoU 0..1 of the float and of the packed model."""
        floating, quantized = zip(*((p.iou_float, p.iou_quantized) for p in self.prompts))
        return float(np.mean(floating)), float(np.mean(quantized))

    @property
    def loss(self) -> float:
        """What quantization took from the mean IoU."""
        return self.means[0] - self.means[1]


def masks_at_size(low_res: Tensor, geometry: Geometry, image_size: int) -> list[np.ndarray]:
    """Masks (H, W) bool of the image file's size from logits (P, h, w), one at a time: photographs are large."""
    return [(geometry.masks_to_original(logits, image_size) > 0).numpy() for logits in low_res]


def score(sample: PromptedImage, outcome: Outcome, image_size: int) -> Scored:
    """Scores one image against the ground truth, or against the float model's masks where there is none.

    Args:
        sample: The image.
        outcome: What both models made of it.
        image_size: Side of the input frame in pixels.
    """
    prompts = []
    for index, box in enumerate(sample.image_boxes):
        floating, quantized = (
            masks_at_size(logits[index : index + 1], sample.geometry, image_size)[0] for logits in outcome.logits
        )
        truth = sample.true_mask(index)
        truth = floating if truth is None else truth
        prompts.append(PromptScore(tuple(map(float, box)), mask_iou(floating, truth), mask_iou(quantized, truth)))
    return Scored(sample, outcome, tuple(prompts))


def choose(scored: Sequence[Scored]) -> dict[str, Scored]:
    """The images with the largest and the middle loss; of a single image only the worst."""
    ranked = sorted(scored, key=lambda each: -each.loss)
    chosen = {WORST: ranked[0]}
    if len(ranked) > 1:
        chosen[MEDIAN] = ranked[len(ranked) // 2]
    return chosen


def draw(chosen: dict[str, Scored], image_size: int) -> tuple[tuple[Example, ...], tuple[HeatMap, ...], Pictures]:
    """Examples, heat maps and the pictures that they name.

    Args:
        chosen: Images by role.
        image_size: Side of the input frame in pixels.
    """
    examples, heat_maps, pictures = [], [], {}
    for role, each in chosen.items():
        pixels = each.sample.read()
        examples.append(_example(role, each, pixels, image_size, pictures))
        for name, rows in each.outcome.focus.items():
            heat_maps.append(_heat_map(role, each, name, rows, pixels, image_size, pictures))
    return tuple(examples), tuple(heat_maps), pictures


def _example(role: str, each: Scored, pixels: np.ndarray, image_size: int, pictures: Pictures) -> Example:
    sample = each.sample
    masks = {
        title: masks_at_size(logits, sample.geometry, image_size)
        for title, logits in zip(("float", "quantized"), each.outcome.logits)
    }
    if sample.truth is not None:
        masks["truth"] = [sample.true_mask(index) for index in range(len(sample.image_boxes))]
    names: dict[str, str] = {}
    for title, stack in masks.items():
        names[title] = f"examples/{role}-{title}{SUFFIX}"
        pictures[names[title]] = mask_picture(pixels, stack, sample.image_boxes)
    zooms = _zooms(role, each, masks, pixels, pictures)
    return Example(
        role, sample.name, names["float"], names["quantized"], names.get("truth"), *each.means, each.prompts, zooms
    )


def _zooms(
    role: str, each: Scored, masks: dict[str, list[np.ndarray]], pixels: np.ndarray, pictures: Pictures
) -> tuple[Zoom, ...]:
    """The small objects whose IoU changed most, in the order of the prompts."""
    reference = masks["truth" if "truth" in masks else "float"]
    small = [index for index, mask in enumerate(reference) if mask.mean() < SMALL_SHARE]
    small.sort(key=lambda index: -abs(each.prompts[index].iou_float - each.prompts[index].iou_quantized))
    zooms = []
    for index in sorted(small[:MAX_ZOOMS]):
        box = each.sample.image_boxes[index]
        region = zoom_region(box, pixels.shape[:2])
        names: dict[str, str] = {}
        for title, stack in masks.items():
            names[title] = f"examples/{role}-{index + 1}-{title}{SUFFIX}"
            pictures[names[title]] = zoom_picture(pixels, stack[index], box, region, index)
        zooms.append(Zoom(index + 1, region, names["float"], names["quantized"], names.get("truth")))
    return tuple(zooms)


def _heat_map(
    role: str,
    each: Scored,
    attention: str,
    rows: tuple[Tensor, Tensor],
    pixels: np.ndarray,
    image_size: int,
    pictures: Pictures,
) -> HeatMap:
    floating, quantized = rows
    sample, box = each.sample, tuple(map(float, each.sample.image_boxes[0]))
    short = attention.partition(".transformer.")[2] or attention
    names = []
    peak = floating.mean(0).max().item()  # also the quantized map's scale: what is lost must look lost
    for title, values in zip(("float", "quantized"), rows):
        names.append(f"heat/{role}-{short}-{title}{SUFFIX}")
        pictures[names[-1]] = heat_picture(pixels, values.mean(0), peak, sample.geometry, image_size, box)
    measures = (
        entropy(floating),
        entropy(quantized),
        kl_divergence(floating, quantized),
        focus_overlap(floating, quantized),
    )
    return HeatMap(attention, sample.name, box, *names, *(measure.mean().item() for measure in measures))
