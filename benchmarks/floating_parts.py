"""What each part of a model costs at 4 bits, and what the parts would cost that stay in floating point.

    python benchmarks/floating_parts.py embedded/sam-nano-256
    python benchmarks/floating_parts.py runs/litemedsam/lite_medsam.pth --images 16

Round to nearest with MSE ranges, on the embedded images unless others are named. One part after the other is quantized
alone; then everything that carsam quantizes; then, on top of that, each part that it leaves in floating point.
Differences of the mean IoU to the float model with their paired 95 % intervals.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import options
import torch
from torch import nn

import carsam
from carsam.bits.plan import BitPlan, Bits
from carsam.calibrate.ranges import calibrate
from carsam.evaluate.coco_metrics import evaluate_coco
from carsam.evaluate.intervals import difference_interval
from carsam.methods.base import create
from carsam.models.family import find_sites
from carsam.models.prepare import prepare_model
from carsam.models.sites import LayerSite, Sites
from carsam.prompts.calibration import calibration_set
from carsam.quantizers import simulate
from carsam.run.walk import fit_weights, quantized_layers

IMAGES = Path(__file__).resolve().parents[1] / "embedded" / "images"
FLOAT = Bits(16, 16)


def groups(model: nn.Module, sites: Sites) -> dict[str, Callable[[str], bool]]:
    """Parts by title: whether a layer or an attention of that name belongs to it."""

    def layers(chosen: Callable[[LayerSite, nn.Module], bool]) -> Callable[[str], bool]:
        names = {site.name for site in sites.layers if chosen(site, model.get_submodule(site.name))}
        return lambda name: name in names

    attentions = {site.name for site in sites.attentions}
    decoder = sites.in_decoder

    def depthwise(_site: LayerSite, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Conv2d) and layer.groups > 1

    def convolution(site: LayerSite, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Conv2d) and layer.groups == 1 and site.name not in in_neck

    *_, neck = sites.encoder_stages
    in_neck = {site.name for site in sites.layers if site.name.startswith(neck + ".")}
    found = {
        "encoder, depthwise convolutions": layers(depthwise),
        "encoder, other convolutions": layers(convolution),
        "encoder, Linears": layers(lambda site, layer: isinstance(layer, nn.Linear) and not decoder(site.name)),
        "encoder, MatMuls of attentions": lambda name: name in attentions and not decoder(name),
        "neck": lambda name: name in in_neck,
        "decoder, Linears": layers(lambda site, _: decoder(site.name)),
        "decoder, MatMuls of attentions": lambda name: name in attentions and decoder(name),
    }
    names = [site.name for site in sites.layers] + list(attentions)
    return {title: holds for title, holds in found.items() if any(map(holds, names))}


def quantized(model: nn.Module, sites: Sites, plan: BitPlan, data, device: torch.device) -> nn.Module:
    """Nearest rounding of what the plan quantizes; the rest computes in floating point."""
    method = create("rtn")
    rounded = copy.deepcopy(model)
    prepare_model(rounded, sites, plan, method.quantizer_for, method.softmax_for)
    rounded.to(device).eval().requires_grad_(False)
    fit_weights(rounded, method.weight_observer)
    calibrate(rounded, data, method.activation_observer)
    for layer in quantized_layers([rounded]):
        layer.freeze()
    return rounded


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("model", help="what carsam quantize takes")
    parser.add_argument("--calibration", type=Path, default=IMAGES / "calibration", help="images/ and instances.json")
    parser.add_argument("--evaluation", type=Path, default=IMAGES / "evaluation", help="images/ and instances.json")
    parser.add_argument("--images", type=int, default=24, help="calibration images")
    parser.add_argument("--limit", type=int, help="measure on the first images only")
    parser.add_argument("--bits", default="w4a4")
    arguments = options.parse(parser)
    bits = Bits.parse(arguments.bits)
    model = carsam.load_model(arguments.model)
    sites = find_sites(model)
    folder = arguments.calibration
    data = calibration_set(model, folder / "images", coco=folder / "instances.json", n_images=arguments.images)

    def measure(of: nn.Module, **state: bool):
        with simulate(**state):
            where = arguments.evaluation
            return evaluate_coco(of, where / "instances.json", where / "images", limit=arguments.limit)

    floating = measure(model)
    print(f"{bits}, {len(data.images)} calibration images\n")
    options.head("at 4 bits", "layers", "mean IoU", "difference to float")
    options.row("nothing (float)", 0, f"{floating.mean_iou:.1f}", "")

    def row(title: str, wider: Sites, plan: BitPlan, count: int) -> None:
        found = measure(quantized(model, wider, plan, data, model.device), weights=True, activations=True)
        difference = difference_interval(found.per_image, floating.per_image)
        options.row(title, count, f"{found.mean_iou:.1f}", difference)

    for title, holds in groups(model, sites).items():
        names = [site.name for site in sites.layers if holds(site.name)]
        operands = [site.operand("*") for site in sites.attentions if holds(site.name)]
        plan = BitPlan(FLOAT, tuple((name, bits) for name in (*names, *operands)))
        row(f"{title} alone", sites, plan, len(names) or len(operands))
    row("**everything that carsam quantizes**", sites, BitPlan(bits), len(sites.layers))
    kept: dict[str, list[LayerSite]] = {}
    for site in sites.floating:
        kept.setdefault(".".join(site.name.split(".")[:2]), []).append(site)
    for title, more in kept.items():
        row(f"the same and `{title}`", replace(sites, layers=(*sites.layers, *more)), BitPlan(bits), len(more))


if __name__ == "__main__":
    main()
