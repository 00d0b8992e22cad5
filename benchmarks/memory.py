"""Peak memory of a whole quantization at 1024 px: every stage, few steps (memory does not grow with them).

    python benchmarks/memory.py                          # ViT-B, hours on two cores
    python benchmarks/memory.py --blocks 3 --boxes 2     # its kinds of block and the decoder, a quarter of an hour
    python benchmarks/memory.py --size sam2-tiny --images 4 --boxes 2
    python benchmarks/memory.py --blocks 3 --preset fast # of car-sam-plus instead of car-sam

With ``--blocks`` the encoder keeps its first blocks only (two windowed, then a global one). What the others would add
is their weights in the float and the quantized model and their codes, which is printed and added; caches are of one
block at a time.
"""

from __future__ import annotations

import time

import options
from calibration import random_data
from random_models import config_of, random_model

import carsam
from carsam.config import QuantizeConfig
from carsam.methods.car_sam_plus import PRESETS
from carsam.models.skeleton import skeleton
from carsam.run.memory import peak_memory

# Float reference, model being quantized (four bytes a weight each), and the codes.
BYTES_PER_WEIGHT = 4 + 4 + 1


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--size", default="vit-b")
    parser.add_argument("--blocks", type=int, help="keep only so many encoder blocks")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--boxes", type=int, default=6)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--cache-gb", type=float, default=6.0)
    parser.add_argument("--preset", choices=PRESETS, help="of car-sam-plus; car-sam is measured without one")
    arguments = options.parse(parser)
    model = random_model(arguments.size, arguments.blocks).requires_grad_(False)
    whole = skeleton(type(model), config_of(arguments.size))
    left_out = whole.num_parameters() - model.num_parameters()
    data = random_data(1024, arguments.images, arguments.boxes)
    method, settings = ("car-sam", {}) if arguments.preset is None else ("car-sam-plus", PRESETS[arguments.preset])
    settings = {**settings, "reconstruction": {"steps": arguments.steps, "decoder_steps": arguments.steps}}
    started = time.perf_counter()

    options.head("after", "peak memory", "unit")

    def progress(unit: int, n_units: int, name: str, step: int, n_steps: int) -> None:
        if step == 0:
            elapsed = time.perf_counter() - started
            options.row(f"{elapsed:.0f} s", f"{peak_memory() / 2**30:.1f} GiB", f"{unit + 1}/{n_units} {name}")

    carsam.quantize(
        model, data, QuantizeConfig(method, settings=settings), cache_gigabytes=arguments.cache_gb, progress=progress
    )
    peak, rest = peak_memory() / 2**30, left_out * BYTES_PER_WEIGHT / 2**30
    print(f"\npeak {peak:.1f} GiB; blocks left out would add {rest:.1f} GiB: {peak + rest:.1f} GiB")


if __name__ == "__main__":
    main()
