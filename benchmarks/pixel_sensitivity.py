"""How far a difference in the last digit of the pixels goes: which codes flip, stage by stage, and what masks become.

    python benchmarks/pixel_sensitivity.py PACKED IMAGES [--float MODEL] [--noise 5e-7]

Prints a row for every image, whose pixels move by up to the noise: the activation codes at the first layer of each
stage of the image encoder that differ, the stage where the first does, the largest difference of the embeddings
relative to their range, and the least IoU of the masks of four boxes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import options
import torch
from torch import Tensor, nn

from carsam.data.images.reading import read_image
from carsam.data.images.transforms import Preprocessor
from carsam.models.family import find_sites
from carsam.pack.checkpoint import open_model
from carsam.predict.predictor import encode_image, predict_logits


def watch(model: nn.Module, pixels: Tensor, inputs: dict[str, str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings, and the quantized input of each stage's first layer."""
    codes: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(_: nn.Module, __: tuple, output: Tensor) -> None:
            codes[name] = output

        return hook

    handles = []
    for name, path in inputs.items():
        quantizer = getattr(model.get_submodule(path), "input_quantizer", None)
        if quantizer is not None:
            handles.append(quantizer.register_forward_hook(keep(name)))
    try:
        return encode_image(model, pixels), codes
    finally:
        for handle in handles:
            handle.remove()


def measure(title: str, source: str, images: list[Path], noise: float, seed: int) -> None:
    """Prints the rows of one model."""
    model = open_model(source)
    sites = find_sites(model)
    # The first quantized layer of every stage.
    inputs = {
        name: next(site.name for site in sites.layers if site.name.startswith(name + "."))
        for name in sites.encoder_stages
    }
    preprocess = Preprocessor.for_model(model)
    for path in images:
        pixels, geometry = preprocess(read_image(path))
        generator = torch.Generator().manual_seed(seed)
        moved = pixels + noise * (2 * torch.rand(pixels.shape, generator=generator) - 1) * (pixels != 0)
        results = [watch(model, each, inputs) for each in (pixels, moved)]
        kept = [result[1] for result in results]
        flips = {name: int((kept[0][name] != kept[1][name]).sum()) for name in kept[0]}
        total = sum(values.numel() for values in kept[0].values())
        first = next((name for name, count in flips.items() if count), "-")
        embeddings = [result[0] for result in results]
        change = (embeddings[0] - embeddings[1]).abs().max() / (embeddings[0].max() - embeddings[0].min())
        height, width = geometry.input_size
        boxes = torch.tensor([[x, y, x + 0.4, y + 0.5] for x in (0.1, 0.4) for y in (0.1, 0.4)])
        boxes = boxes * torch.tensor([width, height, width, height])
        masks = [predict_logits(model, each, boxes=boxes)[0] > 0 for each in embeddings]
        overlap, either = (masks[0] & masks[1]).sum((1, 2, 3)), (masks[0] | masks[1]).sum((1, 2, 3))
        iou = (overlap.float() / either.clamp(min=1)).masked_fill(either == 0, 1).min()
        codes = f"{sum(flips.values())} of {total}" if total else "-"
        options.row(title, path.name, codes, first, f"{float(change):.1e}", f"{float(iou):.4f}")


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("packed", help="packed folder or Hub id")
    parser.add_argument("images", type=Path, help="folder of images, or one")
    parser.add_argument("--float", dest="floating", help="float model to print beside it")
    parser.add_argument("--noise", type=float, default=5e-7)
    parser.add_argument("--seed", type=int, default=0)
    arguments = options.parse(parser)
    images = sorted(arguments.images.iterdir()) if arguments.images.is_dir() else [arguments.images]
    columns = ("image", "codes that differ", "first at", "embeddings, largest difference / range", "least IoU")
    options.head("model", *columns)
    for title, source in (("float", arguments.floating), ("packed", arguments.packed)):
        if source:
            measure(title, source, images, arguments.noise, arguments.seed)


if __name__ == "__main__":
    main()
