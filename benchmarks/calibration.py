"""Speed of the reconstruction loop: steps per second, peak memory, share of time in plain matrix products.

    python benchmarks/calibration.py                    # embedded model; LiteMedSAM and ViT-B, random weights
    python benchmarks/calibration.py --subjects nano
    python benchmarks/calibration.py --subjects litemedsam-decoder,litemedsam-whole

The last two take every unit of LiteMedSAM's decoder, and of the whole model, and add up what their loops would take at
300 steps each: the larger part of a row of evidence (benchmarks/evidence.py).

Each unit goes through the walk's own code (observed ranges, then the optimiser loop under torch's profiler), on random
images. The share counts the self time of matrix products and convolutions against all operators' self time; Python's
own time, seen as the difference to the wall clock, comes behind it. The last column is how many times as fast the loop
is with mixed precision (``reconstruction.mixed_precision``): medians of repeats in turns, without the profiler.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass, replace

import options
import torch
from torch.profiler import ProfilerActivity, profile

import carsam
from carsam.config import QuantizeConfig
from carsam.methods.base import create
from carsam.models.family import find_sites
from carsam.models.prepare import prepare_model
from carsam.models.sam.random import random_sam
from carsam.models.sites import replace_module
from carsam.models.tinyvit.random import random_tinyvit
from carsam.prompts.calibration import CalibrationImage, CalibrationSet
from carsam.reconstruct.optimize import optimise
from carsam.run.context import Hooks, RunContext
from carsam.run.memory import peak_memory
from carsam.run.walk import Walk, fit_weights

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mkldnn_convolution", "convolution_backward", "thnn_conv2d", "dot")


def random_data(size: int, images: int, prompts: int) -> CalibrationSet:
    """Random pixels and boxes."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for index in range(images):
        corners = torch.rand(prompts, 2, 2, generator=generator).sort(dim=1).values * size
        pixels = torch.randn(1, 3, size, size, generator=generator)
        items.append(CalibrationImage(str(index), pixels, corners.flatten(1)))
    return CalibrationSet(tuple(items), 0, "random")


# Of every unit, in a row of evidence.
STEPS = 300
# Of a loop, in each precision.
REPEATS = 3


@dataclass
class Spent:
    """What the loops of some units took, a step of each.

    Attributes:
        units: How many there are.
        wall: Wall-clock seconds.
        products, operators: Seconds of matrix products, and of all operators.
        single, mixed: Wall-clock seconds without the profiler, in single and in mixed precision.
    """

    units: int = 0
    wall: float = 0.0
    products: float = 0.0
    operators: float = 0.0
    single: float = 0.0
    mixed: float = 0.0


def share_of_products(profiler: profile) -> tuple[float, float]:
    """Seconds of matrix products, and of all operators, by their self time."""
    total = products = 0.0
    for event in profiler.key_averages():
        if event.key.startswith("aten::") or event.key.endswith(("Backward", "Quantize")):
            total += event.self_cpu_time_total
            if event.key.removeprefix("aten::") in PRODUCTS:
                products += event.self_cpu_time_total
    return products / 1e6, total / 1e6


def measure(name: str, model, stages: tuple[int, ...] | str, steps: int, images: int, prompts: int) -> None:
    """Runs the walk up to the last of some units; their loops are profiled, other units get no step.

    Args:
        name: Of the model, for the table.
        model: What is quantized.
        stages: Positions of encoder stages to profile, with the decoder's last pair and attention; or ``decoder`` or
            ``whole`` for all of their units, which are added up in a last row.
        steps: Profiled steps of a unit.
        images, prompts: Calibration images and prompts of each.
    """
    method = create("car-sam", {"reconstruction": {"steps": steps, "decoder_steps": steps}})
    sites = find_sites(model)
    # Some stages of the encoder, and the decoder's last pair and attention.
    treated = sites.of_decoder() if stages == "decoder" else sites
    if isinstance(stages, str):
        units = [unit.name for unit in method.units(treated)]
    else:
        units = [*(sites.encoder_stages[index] for index in stages), *(unit.name for unit in method.units(sites)[-2:])]
    spent = Spent()
    quantized = copy.deepcopy(model)
    plan = QuantizeConfig(decoder_only=stages == "decoder").bit_plan(sites)
    prepare_model(quantized, sites, plan, method.quantizer_for, method.softmax_for)
    quantized.requires_grad_(False)
    fit_weights(quantized, "min-max")  # what is measured is the loop; the search for grids is not part of it
    data = random_data(sites.family.image_size(model), images, prompts)

    def profiled(model, unit, data, settings, *, steps, **others):
        if unit.name not in units:
            return optimise(model, unit, data, settings, steps=0, **others)
        optimise_only = dict(others, progress=None)
        fresh = copy.deepcopy(unit.modules(model))

        def again() -> None:
            """The unit as it was before its loop."""
            for path, module in zip(unit.scope, copy.deepcopy(fresh)):
                replace_module(model, path, module)

        def seconds(mixed: bool) -> float:
            again()
            begun = time.perf_counter()
            optimise(model, unit, data, replace(settings, mixed_precision=mixed), steps=steps, **optimise_only)
            return time.perf_counter() - begun

        optimise(model, unit, data, settings, steps=1, **optimise_only)  # warm-up
        turns = [(seconds(False), seconds(True)) for _ in range(REPEATS)]
        single, mixed = (statistics.median(each) for each in zip(*turns))
        again()
        started = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            losses = optimise(model, unit, data, settings, steps=steps, **optimise_only)
        wall = time.perf_counter() - started
        products, operators = share_of_products(profiler)
        line(unit.name, f"{steps / wall:.2f}", products, operators, wall, single / mixed)
        spent.units += 1
        spent.wall += wall / steps
        spent.products += products / steps
        spent.operators += operators / steps
        spent.single += single / steps
        spent.mixed += mixed / steps
        return losses

    def line(what: str, rate: str, products: float, operators: float, wall: float, faster: float) -> None:
        memory = f"{peak_memory() / 2**30:.1f} GiB"
        outside = 1 - min(1, operators / wall)
        options.row(name, what, rate, f"{products / operators:.0%}", memory, f"{outside:.0%}", f"{faster:.2f}")

    Walk(quantized, model, treated, method, data, "benchmark", RunContext(hooks=Hooks(optimise=profiled))).run()
    if isinstance(stages, str):
        what = f"all {spent.units} units at {STEPS} steps: {STEPS * spent.wall / 60:.1f} min"
        rate, faster = f"{spent.units / spent.wall:.2f}", spent.single / spent.mixed
        line(what, rate, spent.products, spent.operators, spent.wall, faster)


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument(
        "--subjects",
        default="nano,litemedsam,vit-b",
        help="nano, litemedsam, vit-b, litemedsam-decoder, litemedsam-whole; by commas",
    )
    parser.add_argument("--steps", type=int, default=30, help="profiled steps of a unit of the embedded model")
    parser.add_argument("--large-steps", type=int, default=3, help="profiled steps of a unit of the larger ones")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=6, help="of an image")
    arguments = options.parse(parser)
    options.head("model", "unit", "steps/s", "matrix products", "peak memory", "outside operators", "mixed")
    subjects = arguments.subjects.split(",")
    if "nano" in subjects:
        model = carsam.load_model("embedded/sam-nano-256")
        measure("nano, 256 px", model, (0, 1), arguments.steps, arguments.images, arguments.prompts)
    if "litemedsam" in subjects:
        model = random_tinyvit("litemedsam")
        # Convolutions at full resolution, a merge, attention in windows of 14 and of 7.
        measure("LiteMedSAM, 256 px", model, (0, 2, 6, 13), arguments.large_steps, arguments.images, arguments.prompts)
    for scope in ("decoder", "whole"):
        if f"litemedsam-{scope}" in subjects:
            model = random_tinyvit("litemedsam")
            measure(f"LiteMedSAM, {scope}", model, scope, arguments.large_steps, arguments.images, arguments.prompts)
    if "vit-b" in subjects:
        # Two windowed blocks, then a global one: the kinds of block there are.
        model = random_sam("vit-b", blocks=3)
        measure("ViT-B, 1024 px", model, (0, 2), arguments.large_steps, arguments.images, arguments.prompts)


if __name__ == "__main__":
    main()
