"""Pictures of docs/BEYOND.md: attention before and after, and the error along the decoder.

    carsam quantize embedded/sam-nano-256 --method rtn --data embedded/images/calibration/images \\
        --data-coco embedded/images/calibration/instances.json --out rtn
    carsam quantize embedded/sam-nano-256 --preset best --data embedded/images/calibration/images \\
        --data-coco embedded/images/calibration/instances.json --out plus
    python benchmarks/beyond_pictures.py embedded/sam-nano-256 --images embedded/images/evaluation/images \\
        --coco embedded/images/evaluation/instances.json --packed RTN=rtn --packed CAR-SAM+=plus --out docs

``beyond-attention.png``: where the mask token looks (mean over heads), float model first, then each packed model; all
of a row on the scale of the float map. ``beyond-course.png``: relative squared error of the decoder's stream after
every part, on a logarithmic scale. The table that is printed has the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import options
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from carsam.diagnose.measures import focus_overlap
from carsam.diagnose.oscillation import StageErrors
from carsam.diagnose.pair import Pair, open_pair
from carsam.diagnose.passes import Passes, run_passes
from carsam.diagnose.pictures import heat_picture
from carsam.prompts.diagnosis import diagnosis_images
from carsam.prompts.image import PromptedImage

# Pixels: a heat map, the space between, titles, the chart.
SIDE, GAP, TITLE = 250, 8, 22
CHART, LEFT, BOTTOM = (860, 340), 64, 92
INK, FAINT = (40, 40, 40), (215, 215, 215)
# Okabe and Ito's colours: told apart with colour blindness.
COLORS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167))
# Colours in a file: few enough to keep it small.
PALETTE = 96


def attention_picture(
    sample: PromptedImage,
    found: dict[str, Passes],
    index: int,
    image_size: int,
    names: Sequence[str],
    short: Sequence[str],
) -> Image.Image:
    """Rows of attentions, columns of models: the mask token's attention over one image.

    Args:
        sample: The image.
        found: Passes by the model's title.
        index: Number of the image.
        image_size: Side of the input frame in pixels.
        names, short: Attentions, and what to call them.
    """
    pixels, box = sample.read(), [float(value) for value in sample.image_boxes[0]]
    titles = ["float", *found]
    width = len(titles) * (SIDE + GAP) + GAP
    aspect = min(1.0, pixels.shape[0] / pixels.shape[1])
    step = round(SIDE * aspect) + TITLE + GAP
    picture = Image.new("RGB", (width, len(names) * step + TITLE), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for column, title in enumerate(titles):
        draw.text((GAP + column * (SIDE + GAP), 4), title, INK, font)
    for row, (name, called) in enumerate(zip(names, short)):
        top = TITLE + row * step
        floating = next(iter(found.values())).outcomes[index].focus[name][0]
        peak = floating.mean(0).max().item()
        maps = [floating, *(each.outcomes[index].focus[name][1] for each in found.values())]
        for column, values in enumerate(maps):
            heat = heat_picture(pixels, values.mean(0), peak, sample.geometry, image_size, box)
            heat.thumbnail((SIDE, SIDE))
            left = GAP + column * (SIDE + GAP)
            picture.paste(heat, (left, top))
            text = (
                called.rpartition("decoder.")[2]
                if column == 0
                else f"focus kept: {focus_overlap(floating, values).mean().item():.2f}"
            )
            draw.text((left, top + heat.height + 3), text, INK, font)
    return picture


def chart(names: Sequence[str], errors: dict[str, Sequence[float]]) -> Image.Image:
    """Curves of relative errors over the decoder's parts.

    Args:
        names: Of the parts, in order.
        errors: Of each model, by its title.
    """
    picture = Image.new("RGB", CHART, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    values = [math.log10(max(value, 1e-6)) for each in errors.values() for value in each]
    low, high = math.floor(min(values)), max(math.ceil(max(values)), math.floor(min(values)) + 1)
    width, height = CHART[0] - LEFT - 20, CHART[1] - BOTTOM - 30

    def place(index: int, value: float) -> tuple[float, float]:
        share = (math.log10(max(value, 1e-6)) - low) / (high - low)
        return LEFT + width * index / max(1, len(names) - 1), 30 + height * (1 - share)

    for power in range(low, high + 1):
        _, y = place(0, 10.0**power)
        draw.line([(LEFT, y), (LEFT + width, y)], FAINT)
        draw.text((8, y - 8), f"{10.0**power:g}", INK, font)
    for index, name in enumerate(names):
        x, y = place(index, 10.0**low)
        draw.line([(x, y), (x, y + 5)], INK)
        draw.text((x - 4, y + 8), str(index + 1), INK, font)
        column, row = divmod(index, 3)
        draw.text((LEFT + 265 * column, y + 28 + 16 * row), f"{index + 1}  {name.removeprefix('decoder.')}", INK, font)
    for (title, each), color, number in zip(errors.items(), COLORS, range(len(errors))):
        points = [place(index, value) for index, value in enumerate(each)]
        draw.line(points, color, 3, joint="curve")
        for x, y in points:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], color)
        draw.text((LEFT + 10 + 140 * number, 8), title, color, font)
    return picture


@torch.no_grad()
def measured(pair: Pair, samples: tuple[PromptedImage, ...]) -> tuple[Passes, tuple[float, ...]]:
    """Passes of both models, and errors of the decoder's parts."""
    passes = run_passes(pair, samples)
    boxes: list[Tensor] = [sample.boxes for sample in samples]
    meter = StageErrors(pair, boxes, passes.embeddings[0])
    return passes, meter.measure(pair.packed, passes.embeddings[1])


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--images", required=True)
    parser.add_argument("--coco", required=True)
    parser.add_argument("--packed", action="append", required=True, help="TITLE=FOLDER")
    parser.add_argument("--limit", type=int, default=8, help="images for the errors; one of them is shown")
    parser.add_argument("--show", type=int, default=0, help="number of the image that is shown")
    parser.add_argument("--out", type=Path, required=True, help="folder for both pictures")
    arguments = options.parse(parser)
    found, errors = {}, {}
    for text in arguments.packed:
        title, _, folder = text.partition("=")
        pair = open_pair(arguments.model, folder, "cpu")
        samples = diagnosis_images(pair.source, arguments.images, coco=arguments.coco, limit=arguments.limit, prompts=4)
        found[title], errors[title] = measured(pair, samples)
    focus = pair.sites.focus
    side = pair.sites.family.image_size(pair.source)
    called = pair.sites.family.names.short
    short, names = [called(name) for name in focus], [called(moment.name) for moment in pair.sites.moments]
    shown = attention_picture(samples[arguments.show], found, arguments.show, side, focus, short)
    for name, picture in (("attention", shown), ("course", chart(names, errors))):
        path = arguments.out / f"beyond-{name}.png"
        picture.quantize(PALETTE).save(path, optimize=True)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
    print()
    options.head("after", *errors)
    for index, name in enumerate(names):
        options.row(name, *(f"{each[index]:.3f}" for each in errors.values()))


if __name__ == "__main__":
    main()
