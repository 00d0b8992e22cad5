"""Bytes of exported files of the real architectures, and what they run in: random weights, so nothing is downloaded.

python benchmarks/export_sizes.py --size vit-b --bits 4 --bits 8 --run
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from carsam.data.images.normalisation import IMAGENET
from carsam.export.export import FORMAT, write
from carsam.export.profile import Subject, profiles
from carsam.export.trace import trace
from carsam.models.family import family_of, find_sites
from carsam.models.sam.random import random_sam
from carsam.models.sites import OPERANDS
from carsam.pack.layers import PackedLayer
from carsam.pack.layout import build_packed
from carsam.quantizers import ActivationQuantizer


def packed(model: nn.Module, bits: int) -> nn.Module:
    """The model with random codes and uniform grids at all of its sites, in place."""
    sites = find_sites(model)
    uniform = {"grid": "uniform", "bits": bits}
    layers = {site.name: {"weight": bits, "input": uniform} for site in sites.layers}
    attentions = {site.name: dict.fromkeys(OPERANDS, uniform) for site in sites.attentions}
    build_packed(model, {"layers": layers, "attentions": attentions})
    for path, module in model.named_modules():
        if isinstance(module, PackedLayer):
            module.weight.random_(0, 256)
            module.weight_scale.fill_(0.01)
            module.weight_zero_point.fill_(2 ** (bits - 1))
        elif isinstance(module, ActivationQuantizer):
            top = 1.0 if "probs" in path else 4.0
            module.set_range(0.0 if "probs" in path else -top, top)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="vit-b", help="vit-b, vit-l or vit-h")
    parser.add_argument("--bits", type=int, action="append", help="of weights and activations; repeatable")
    parser.add_argument("--run", action="store_true", help="also run the encoder in ONNX Runtime")
    parser.add_argument("--out", type=Path, help="keep the files here")
    arguments = parser.parse_args()
    print(f"{arguments.size}, 1024 px, random weights; the image encoder's file")
    print("| bits | bytes | of FP16 |" + (" loading s | encoder ms |" if arguments.run else ""))
    for bits in arguments.bits or [4]:
        model = random_sam(arguments.size, 1024).requires_grad_(False)
        encoder = sum(each.numel() for each in family_of(model).embedding_module(model).parameters())
        family = family_of(model)
        if bits < 16:
            # Packed folders hold in float16 what is not quantized.
            packed(model.half().float(), bits)
        name = f"w{bits}a{bits}" if bits < 16 else "float"
        metadata = {"carsam.format": FORMAT, "carsam.bits": name}
        subject = Subject("random", "random", family.name, (), IMAGENET, bits, {}, {}, metadata)
        core = trace(model, family)
        del model
        with tempfile.TemporaryDirectory() as folder:
            place = (arguments.out or Path(folder)) / name
            files = write(place, profiles()["onnx"], subject, core).files
            size = files["encoder.onnx"] + files.get("encoder.onnx.data", 0)
            row = f"| {name} | {size / 1e6:.1f} MB | {size / (2 * encoder):.3f} |"
            print(row + (run(place / "encoder.onnx") if arguments.run else ""), flush=True)


def run(path: Path) -> str:
    """Seconds to load and milliseconds of the second and third run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(str(path), options)
    loading = time.perf_counter() - start
    pixels = {"pixel_values": torch.zeros(1, 3, 1024, 1024).numpy()}
    times = []
    for _ in range(3):
        start = time.perf_counter()
        session.run(None, pixels)
        times.append(time.perf_counter() - start)
    return f" {loading:.1f} | {1000 * min(times[1:]):.0f} |"


if __name__ == "__main__":
    main()
