"""How far a difference in the last digit of the pixels goes: which codes flip, stage by stage, and what masks become.

    python benchmarks/pixel_sensitivity.py PACKED IMAGE [--float MODEL] [--noise 5e-7]

Prints a row for every stage of the image encoder (largest difference at its output relative to its range, codes at its
first activation grid that differ), then the IoU of the masks, for the packed model and for the float one beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import carsam
from carsam.data.images import read_image
from carsam.data.transforms import Preprocessor
from carsam.models.sites import find_sites
from carsam.predictor import encode_image, predict_logits


def watch(model: nn.Module, pixels: Tensor, stages: list[str], inputs: dict[str, str]) -> tuple[Tensor, dict, dict]:
    """Embeddings, the output of each stage, and the quantized input of each stage's first layer."""
    outputs: dict[str, Tensor] = {}
    codes: dict[str, Tensor] = {}

    def keep(store: dict[str, Tensor], name: str):
        def hook(_: nn.Module, __: tuple, output: Tensor) -> None:
            store[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(outputs, name)) for name in stages]
    for name, path in inputs.items():
        quantizer = getattr(model.get_submodule(path), "input_quantizer", None)
        if quantizer is not None:
            handles.append(quantizer.register_forward_hook(keep(codes, name)))
    try:
        return encode_image(model, pixels), outputs, codes
    finally:
        for handle in handles:
            handle.remove()


def measure(title: str, source: str, image_path: Path, noise: float, seed: int) -> None:
    """Prints the table of one model."""
    from carsam.pack.checkpoint import open_model

    model = open_model(source)
    sites = find_sites(model)
    stages = list(sites.encoder_stages)
    inputs = {name: f"{name}.attn.qkv" if "layers" in name else f"{name}.conv1" for name in stages}
    image = read_image(image_path)
    pixels, geometry = Preprocessor.for_model(model)(image)
    generator = torch.Generator().manual_seed(seed)
    moved = pixels + noise * (2 * torch.rand(pixels.shape, generator=generator) - 1) * (pixels != 0)
    results = [watch(model, each, stages, inputs) for each in (pixels, moved)]
    print(f"\n{title}: {source}, pixels moved by up to {noise:g}\n")
    print("| stage | codes that differ | largest difference / range | mean difference / range |")
    print("| --- | --- | --- | --- |")
    for name in stages:
        a, b = (result[1][name] for result in results)
        span = float(a.max() - a.min())
        flips = "-"
        if name in results[0][2]:
            flips = f"{100 * (results[0][2][name] != results[1][2][name]).float().mean():.4f} %"
        delta = (a - b).abs()
        print(f"| {name} | {flips} | {float(delta.max()) / span:.1e} | {float(delta.mean()) / span:.1e} |")
    height, width = geometry.input_size
    boxes = torch.tensor([[x, y, x + 0.4, y + 0.5] for x in (0.1, 0.4) for y in (0.1, 0.4)])
    boxes = boxes * torch.tensor([width, height, width, height])
    masks = [predict_logits(model, result[0], boxes=boxes)[0] > 0 for result in results]
    inter, union = (masks[0] & masks[1]).sum((1, 2, 3)), (masks[0] | masks[1]).sum((1, 2, 3))
    iou = inter / union.clamp(min=1)
    print(f"\nIoU of the masks of {len(boxes)} boxes: least {float(iou.min()):.4f}, mean {float(iou.mean()):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", help="packed folder or Hub id")
    parser.add_argument("image", type=Path)
    parser.add_argument("--float", dest="floating", help="float model to print beside it")
    parser.add_argument("--noise", type=float, default=5e-7)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"carsam {carsam.__version__}, torch {torch.__version__}")
    if arguments.floating:
        measure("float", arguments.floating, arguments.image, arguments.noise, arguments.seed)
    measure("packed", arguments.packed, arguments.image, arguments.noise, arguments.seed)


if __name__ == "__main__":
    main()
