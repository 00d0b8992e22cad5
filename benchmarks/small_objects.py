"""What small objects lose, and what the refit of layers makes of them: agreement with the float masks by size of box.

    python benchmarks/small_objects.py embedded/sam-nano-256 --images IMAGES --coco INSTANCES.json --decoder-only \\
        --row "no refit=car-sam-plus learn=false tuning.steps=0 refit.enabled=false" \\
        --row "refit=car-sam-plus learn=false tuning.steps=0"

As ``choices.py``: the first 32 calibration images quantize, the next 32 judge. To each object's box another one is
added, somewhere in it and of a size drawn evenly in its logarithm from 4 px up, so that there are enough small ones.
Per size of box: mean IoU with the float model's mask, and places of the low-resolution mask in floating point and in
4 bits.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import options
import torch
from choices import add_trial, agreement, drawn, masks_of, row_of

import carsam
from carsam.prompts.calibration import CalibrationSet
from carsam.prompts.image import PromptedImage

# Areas in pixels of the input.
BINS = (0, 64, 256, 1024, 4096, 10**9)
SMALLEST = 4.0


def with_smaller(image: PromptedImage, generator: torch.Generator) -> PromptedImage:
    """The image with a smaller box beside each of its own."""
    corners, sizes = image.boxes[:, :2], image.boxes[:, 2:] - image.boxes[:, :2]
    longer = sizes.amax(1, keepdim=True)
    drawn = torch.rand(len(sizes), 3, generator=generator)
    share = ((longer.clamp(min=SMALLEST) / SMALLEST) ** (drawn[:, :1] - 1)).clamp(max=1)
    inner = (sizes * share).clamp(min=2)
    start = corners + drawn[:, 1:] * (sizes - inner).clamp(min=0)
    boxes = torch.cat([image.boxes, torch.cat([start, start + inner], 1)])
    return replace(image, boxes=boxes, image_boxes=None, geometry=None, truth=None)


def main() -> None:
    parser = options.parser(__doc__)
    add_trial(parser)
    arguments = options.parse(parser)

    model = carsam.load_model(arguments.model)
    solving, judging = drawn(model, arguments)
    generator = torch.Generator().manual_seed(arguments.seed)
    judge = CalibrationSet.of([with_smaller(image, generator) for image in judging])
    areas = torch.cat([(image.boxes[:, 2:] - image.boxes[:, :2]).prod(1) for image in judge.images])
    floats = masks_of(model, judge)
    options.head("row", "box, px²", "boxes", "IoU with the float masks", "places, float", "places")
    for label, config, images in (row_of(text, arguments) for text in arguments.row):
        masks = masks_of(carsam.quantize(model, CalibrationSet.of(solving[:images]), config).model, judge)
        ious = torch.tensor([iou for image in agreement(masks, floats) for iou in image.ious])
        places = [torch.cat([each.sum((1, 2)) for each in found]).float() for found in (floats, masks)]
        for low, high in pairwise(BINS):
            own = (areas >= low) & (areas < high)
            size = f"{low} to {high}" if high < BINS[-1] else f"from {low}"
            means = [f"{each[own].mean().item():.1f}" for each in (ious, *places)]
            options.row(label, size, str(int(own.sum())), *means)


if __name__ == "__main__":
    main()
