"""Settings of methods on held-out calibration images: which agrees best with the float model.

    python benchmarks/choices.py embedded/sam-nano-256 --images IMAGES --coco INSTANCES.json \
        --row "BIG published=ptq4sam-s bimodal_rule=published" --row "BIG calibration=ptq4sam-s"

Every row is quantized on the first 32 calibration images and measured on the next 32: mean IoU of its masks with the
float model's, and the difference to the first row with its 95 % interval over images. No annotation is scored, and no
image of a table of results. With ``--stress`` the subject is the stressed twin of that strength (METHOD.md, 9); the
image encoder stays in floating point with ``--decoder-only``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import options
import torch
from torch import nn
from transformers import PreTrainedModel

import carsam
from carsam.commands.recipe import parse_assignments
from carsam.config import QuantizeConfig
from carsam.evaluate.intervals import difference_interval
from carsam.models.forward import encode_image, predict_logits
from carsam.prompts.calibration import CalibrationSet
from carsam.prompts.image import PromptedImage
from carsam.transform.stress import stress


@dataclass
class Scores:
    """One image's IoUs with the float model's masks."""

    name: str
    ious: list[float]


def row_of(text: str, arguments: argparse.Namespace) -> tuple[str, QuantizeConfig, int | None]:
    """Label and quantization of ``LABEL=METHOD name=value …``; a dot in a name leads into a nested setting.

    ``budget=4.0bits`` mixes bits under that budget, ``images=8`` quantizes on the first eight images alone.
    """
    label, _, rest = text.partition("=")
    method, *changes = rest.split()
    settings: dict[str, Any] = parse_assignments(changes)
    budget, images = settings.pop("budget", None), settings.pop("images", None)
    config = QuantizeConfig(method, settings, arguments.bits, decoder_only=arguments.decoder_only, budget=budget)
    return label, config, images


@torch.no_grad()
def masks_of(model: nn.Module, data: CalibrationSet) -> list[torch.Tensor]:
    """Low-resolution masks (prompts, h, w) of every image."""
    return [
        predict_logits(model, encode_image(model, image.pixel_values), boxes=image.boxes)[0][:, 0] > 0
        for image in data.images
    ]


def agreement(masks: list[torch.Tensor], floats: list[torch.Tensor]) -> list[Scores]:
    """IoU in per cent of every mask with the float model's; 100 where both are empty."""
    found = []
    for index, (ours, theirs) in enumerate(zip(masks, floats)):
        union = (ours | theirs).sum((1, 2))
        ious = torch.where(union > 0, 100.0 * (ours & theirs).sum((1, 2)) / union.clamp(min=1), 100.0)
        found.append(Scores(str(index), ious.tolist()))
    return found


def add_trial(parser: argparse.ArgumentParser) -> None:
    """Rows to try, and the images that quantize and judge."""
    options.add_data(parser, measured=False)
    parser.add_argument("--row", action="append", default=[], required=True, help="LABEL=METHOD name=value ...")
    parser.add_argument("--calibrate", type=int, default=32, help="images to quantize on")
    parser.add_argument("--judge", type=int, default=32, help="images to measure on")
    parser.add_argument("--boxes", type=int, default=6, help="boxes an image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decoder-only", action=argparse.BooleanOptionalAction, default=False)


def drawn(model: PreTrainedModel, arguments: argparse.Namespace) -> tuple[Sequence[PromptedImage], ...]:
    """Calibration images that quantize, and those that judge."""
    count = arguments.calibrate + arguments.judge
    given = {"coco": arguments.coco, "n_images": count, "minimum": count, "boxes_per_image": arguments.boxes}
    chosen = carsam.calibration_set(model, arguments.images, **given, seed=arguments.seed).images
    return chosen[: arguments.calibrate], chosen[arguments.calibrate :]


def main() -> None:
    parser = options.parser(__doc__)
    add_trial(parser)
    parser.add_argument("--stress", type=float, default=0.0)
    arguments = options.parse(parser)

    model = carsam.load_model(arguments.model)
    if arguments.stress:
        model = stress(model, arguments.stress)
    solve, judge = map(CalibrationSet.of, drawn(model, arguments))
    floats = masks_of(model, judge)
    options.head("row", "IoU with the float masks", "to the first row (95 %)")
    first = None
    for label, config, images in (row_of(text, arguments) for text in arguments.row):
        packed = carsam.quantize(model, CalibrationSet.of(solve.images[:images]), config).model
        scores = agreement(masks_of(packed, judge), floats)
        ious = [iou for image in scores for iou in image.ious]
        difference = None if first is None else difference_interval(scores, first)
        first = first or scores
        told = (
            "" if difference is None else f"{difference.value:+.1f} ({difference.low:+.1f} to {difference.high:+.1f})"
        )
        options.row(label, f"{sum(ious) / len(ious):.1f}", told)


if __name__ == "__main__":
    main()
