"""Frames a second and peak memory of following one object, float beside simulated, on random weights of the real sizes.

    python benchmarks/video_speed.py                         # tiny, small, base-plus, large at 1024 px
    python benchmarks/video_speed.py --sizes tiny --frames 4

Every model runs in a process of its own, so that peaks are its own. The simulated one is rounded to nearest with the
ranges of one short clip, which decide no time. The first frame, whose object is shown, is not timed.
"""

from __future__ import annotations

import multiprocessing
import time

import numpy as np
import options
import torch

import carsam
from carsam.config import QuantizeConfig
from carsam.models.sam2.random import random_sam2
from carsam.predict.video import SamVideoPredictor
from carsam.prompts.calibration import CalibrationSet
from carsam.prompts.clips import PromptedClip
from carsam.run.memory import peak_memory

SIZES = "tiny,small,base-plus,large"


def measure(size: str, side: int, frames: int, threads: int, bits: str, device: str) -> tuple[float, int]:
    """Frames a second, and peak memory in bytes; without bits the float model."""
    torch.set_num_threads(threads)
    model = random_sam2(size, side, video=True)
    if bits:
        moving = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        box = torch.tensor([[0.2, 0.2, 0.7, 0.7]]) * side
        data = CalibrationSet.of([PromptedClip("noise", moving[:1], box, frames=moving)])
        settings = {"weight_observer": "min-max", "activation_observer": "min-max"}
        model = carsam.quantize(model, data, QuantizeConfig("rtn", settings, bits), device=device).model
    predictor = SamVideoPredictor(model.to(device))
    generator = np.random.default_rng(0)
    clip = [generator.integers(0, 255, (side, side, 3), dtype=np.uint8) for _ in range(frames + 1)]
    state = predictor.init_state(clip)
    mask = np.zeros((side, side), bool)
    mask[side // 4 : side // 2, side // 4 : side // 2] = True
    predictor.add_new_mask(state, 0, 1, mask)
    started = time.perf_counter()
    for index, _ in enumerate(predictor.track(state)):
        if index == 0:
            started = time.perf_counter()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return frames / (time.perf_counter() - started), peak_memory(torch.device(device))


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--frames", type=int, default=8, help="timed frames")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--device", default="cpu")
    arguments = options.parse(parser)
    options.head("model", "input", "weights and activations", "frames a second", "peak memory")
    context = multiprocessing.get_context("spawn")
    for size in arguments.sizes.split(","):
        for bits in ("", arguments.bits):
            values = (size, arguments.image_size, arguments.frames, torch.get_num_threads(), bits, arguments.device)
            with context.Pool(1) as pool:
                speed, memory = pool.apply(measure, values)
            name = f"simulated {bits.upper()}" if bits else "float"
            options.row(size, f"{arguments.image_size} px", name, f"{speed:.2f}", f"{memory / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
