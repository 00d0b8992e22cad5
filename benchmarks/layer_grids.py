"""Output errors of single layers with AHCPTQ's grids and CAR-SAM+'s shifted one on their inputs, beside a uniform grid.

    python benchmarks/layer_grids.py embedded/sam-nano-256 --images IMAGES --coco INSTANCES.json

Grids are fitted on the first half of the calibration images; errors are those of the layer's output on the other half,
‖(X̂ − X) Wᵀ‖² over the variance of X Wᵀ, weights and all else in floating point: the median over the layers of a part,
and the mean of each layer's share of what a uniform grid costs it. HLUQ is on the second layers of MLPs, CAG (grouped
once, before learning) on their first layers and on projections, a shift for every channel on all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from statistics import median

import options
import torch
from torch import Tensor

import carsam
from carsam.models.family import find_sites
from carsam.models.sites import MLP_IN, MLP_OUT, PROJECTION
from carsam.quantizers import ActivationQuantizer, GroupedQuantizer, HybridQuantizer, ShiftedQuantizer, SiteQuantizer

# Every so manieth row of a pass: neighbours in an image are alike.
STRIDE = 7
GROUPED: dict[str, Callable[[int], SiteQuantizer]] = {
    "uniform": ActivationQuantizer,
    "CAG by grids": lambda bits: GroupedQuantizer(bits, by="grids"),
    "CAG by ranges": lambda bits: GroupedQuantizer(bits, by="ranges"),
    "shifted": ShiftedQuantizer,
}
GRIDS: dict[str, dict[str, Callable[[int], SiteQuantizer]]] = {
    MLP_OUT: {"uniform": ActivationQuantizer, "HLUQ": HybridQuantizer, "shifted": ShiftedQuantizer},
    MLP_IN: GROUPED,
    PROJECTION: GROUPED,
}


@torch.no_grad()
def output_error(quantizer: SiteQuantizer, fitted: list[Tensor], held_out: Tensor, weight: Tensor) -> float:
    """The relative squared error on held-out rows (n, in) of a grid that is fitted on passes of (n, in)."""
    record = quantizer.record()
    for rows in fitted:
        record.update(rows, weight=weight)
    record.fit(quantizer, "mse")
    exact = held_out @ weight.T
    error = (quantizer.round(held_out, quantizer.step_along(held_out)) - held_out) @ weight.T
    return (error.square().sum() / (exact - exact.mean(0)).square().sum()).item()


def main() -> None:
    parser = options.parser(__doc__)
    options.add_data(parser, measured=False)
    parser.add_argument("--n-images", type=int, default=12, help="calibration images, half of them held out")
    arguments = options.parse(parser)
    model = carsam.load_model(arguments.model)
    sites = find_sites(model)
    count = arguments.n_images
    data = carsam.calibration_set(model, arguments.images, coco=arguments.coco, n_images=count, minimum=count)
    chosen = {site.name: site for site in sites.layers if site.role in GRIDS}
    seen: dict[str, list[Tensor]] = {name: [] for name in chosen}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: seen[name].append(inputs[0].flatten(0, -2)[::STRIDE].clone())
        )
        for name in chosen
    ]
    with torch.no_grad():
        for image in data.images:
            sites.family.forward(model, image)
    for handle in handles:
        handle.remove()

    bits = int(arguments.bits.lower().rpartition("a")[2])
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for name, site in chosen.items():
        passes, half = seen.pop(name), len(data.images) // 2
        weight = model.get_submodule(name).weight.detach()
        part = "decoder" if sites.in_decoder(name) else "encoder"
        for grid, make in GRIDS[site.role].items():
            error = output_error(make(bits), passes[:half], torch.cat(passes[half:]), weight)
            found[part, site.role, grid].append(error)
    options.head("part", "layers", "grid of the input", "error of the output", "to uniform")
    for (part, role, grid), errors in found.items():
        uniform = found[part, role, "uniform"]
        share = sum(ours / theirs for ours, theirs in zip(errors, uniform)) / len(errors)
        options.row(part, f"{role} ({len(errors)})", grid, f"{median(errors):.5f}", f"{share:.2f}")


if __name__ == "__main__":
    main()
