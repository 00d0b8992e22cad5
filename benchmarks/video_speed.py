"""Frames a second and peak memory of following one object, float beside simulated, on random weights of the real sizes.

    python benchmarks/video_speed.py                         # tiny, small, base-plus, large at 1024 px
    python benchmarks/video_speed.py --sizes tiny --image-size 256 --frames 493 --keep runs/video-speed

A packed model computes in floating point on its integers (simulated). It is rounded to nearest with the ranges of one
short clip, which decide no time. Every model runs in a process of its own, so that peaks are its own; quantizing it is
another process, and with ``--keep`` happens once.

Frames are timed once the memory holds as many maps as it ever reads (seven); they take as long from there on but for
the few tokens of object pointers. ``--shown 7`` fills it in less time: a frame that shows the object reads no memory.
What is kept for later frames counts the numbers in all tensors of the memory bank after the last frame: with object
pointers it is full after 32 frames. CPU seconds are what all threads took for a frame; with ``--threads 1`` they hold
on a machine that does other work as well.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from pathlib import Path

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
# Maps that memory attention reads at most, in every published size.
FILLING = 7
Measured = tuple[float, float, int, int]


def pack(size: str, side: int, bits: str, folder: Path) -> None:
    """Writes a packed model of random weights into a folder."""
    moving = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[0.2, 0.2, 0.7, 0.7]]) * side
    data = CalibrationSet.of([PromptedClip("noise", moving[:1], box, frames=moving)])
    settings = {"weight_observer": "min-max", "activation_observer": "min-max"}
    carsam.quantize(random_sam2(size, side, video=True), data, QuantizeConfig("rtn", settings, bits), out=folder)


def measure(size: str, side: int, shown: int, frames: int, threads: int, packed: Path | None, device: str) -> Measured:
    """Frames a second, CPU seconds each, peak memory in bytes, numbers kept; of the float model without ``packed``."""
    torch.set_num_threads(threads)
    model = random_sam2(size, side, video=True) if packed is None else carsam.load(packed)
    predictor = SamVideoPredictor(model.to(device).eval())
    generator = np.random.default_rng(0)
    clip = [generator.integers(0, 255, (side, side, 3), dtype=np.uint8) for _ in range(FILLING + frames)]
    state = predictor.init_state(clip)
    mask = np.zeros((side, side), bool)
    mask[side // 4 : side // 2, side // 4 : side // 2] = True
    for frame in range(shown):
        predictor.add_new_mask(state, frame, 1, mask)
    started = computed = 0.0
    for index, _ in enumerate(predictor.track(state)):
        if index == FILLING - 1:
            started, computed = time.perf_counter(), time.process_time()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    seconds, computed = time.perf_counter() - started, time.process_time() - computed
    return frames / seconds, computed / frames, peak_memory(torch.device(device)), state.tracker.kept()


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--frames", type=int, default=4, help="timed frames")
    parser.add_argument("--shown", type=int, default=1, help="first frames whose mask is given")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep", type=Path, help="folder of packed models, which are used again")
    arguments = options.parse(parser)
    columns = ("frames", "frames a second", "CPU seconds a frame", "peak memory", "kept for later frames")
    options.head("model", "input", "weights and activations", *columns)
    context = multiprocessing.get_context("spawn")
    side, threads = arguments.image_size, torch.get_num_threads()
    with tempfile.TemporaryDirectory() as temporary:
        for size in arguments.sizes.split(","):
            packed = (arguments.keep or Path(temporary)) / f"{size}-{side}-{arguments.bits}"
            if not packed.exists():
                with context.Pool(1) as pool:
                    pool.apply(pack, (size, side, arguments.bits, packed))
            for title, folder in (("float", None), (f"simulated {arguments.bits.upper()}", packed)):
                values = (size, side, arguments.shown, arguments.frames, threads, folder, arguments.device)
                with context.Pool(1) as pool:
                    speed, computed, memory, kept = pool.apply(measure, values)
                told = (f"{speed:.2f}", f"{computed:.2f}", f"{memory / 2**30:.2f} GiB", f"{kept / 1e6:.2f} M")
                options.row(size, f"{side} px", title, FILLING + arguments.frames, *told)


if __name__ == "__main__":
    main()
