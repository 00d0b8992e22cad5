"""Why a folding serves one set of images and hurts on another: single attentions, with single operands quantized.

    python benchmarks/beyond.py runs/litemedsam/lite_medsam.pth --images medical/calibration/images \\
        --coco medical/calibration/instances.json

Every decoder attention alone, on the float model's inputs: relative squared error of its output on held-out images,
with 4-bit codes of Q, K and V (no map between them can win more than this), of V, of P, or of all four; values as
they are, centred at their mean over the calibration set, and at their median. Weights and the layers' inputs stay in
floating point, so that nothing but the MatMuls errs. P is on the uniform grid, its step by its own error ("own") or by
the error of PV; then on row-maximum codes. Ranges are those of least squared error, but for V where its whole range is
named.

"one value" is the share of the tokens whose value lies within a tenth of a standard deviation of the channel's most
frequent value, the mean over channels: much of it means that most tokens have the same value, as on black background.
"""

from __future__ import annotations

import copy

import options
import torch
from torch import Tensor, nn

import carsam
from carsam.bits.plan import BitPlan, Bits
from carsam.models.family import find_sites
from carsam.models.sites import AttentionSite, Sites
from carsam.prompts.calibration import CalibrationSet, calibration_set
from carsam.quantizers import RowMaximumSoftmax, SoftmaxQuantizer, UniformSoftmax
from carsam.transform.attention_equivalences import centre_values
from carsam.transform.calls import captured_calls, island
from carsam.transform.choice import Trial
from carsam.transform.statistics import hooked, pass_over

# Values of one pass that medians and most frequent values are found from, by their stride.
STRIDE, BINS = 17, 100
CASES = (
    ("Q, K and V", ("query", "key", "value"), "own"),
    ("V", ("value",), "product"),
    ("V, whole range", ("value",), "product"),
    ("P, own step", ("probs",), "own"),
    ("P", ("probs",), "product"),
    ("V and P, own step", ("value", "probs"), "own"),
    ("V and P", ("value", "probs"), "product"),
    ("all, own step", ("query", "key", "value", "probs"), "own"),
    ("all", ("query", "key", "value", "probs"), "product"),
    ("row-maximum P alone", ("probs",), "row-max"),
    ("all, row-maximum P", ("query", "key", "value", "probs"), "row-max"),
    ("all, row-maximum P, whole range of V", ("query", "key", "value", "probs"), "row-max"),
)


def softmax(grid: str, _site: str, bits: int) -> SoftmaxQuantizer:
    """The quantizer of P that a case names."""
    if grid == "row-max":
        return RowMaximumSoftmax(bits)
    return UniformSoftmax(bits, range_by="observer" if grid == "own" else "product")


def values_of(model: nn.Module, sites: Sites, data: CalibrationSet, images: int) -> dict[str, Tensor]:
    """Some values of every attention, (tokens, channels)."""
    found: dict[str, list[Tensor]] = {site.name: [] for site in sites.attentions}
    hooks = [
        (site.value.layer, lambda _x, out, name=site.name: found[name].append(out.flatten(0, -2)[::STRIDE].clone()))
        for site in sites.attentions
    ]
    with hooked(model, hooks):
        for image in data.images[:images]:
            pass_over(model, sites, image)
    return {name: torch.cat(each) for name, each in found.items()}


def one_value(values: Tensor) -> float:
    """Mean over channels of the share of tokens near the channel's most frequent value."""
    shares = []
    for channel in values.T:
        counts = torch.histc(channel, BINS)
        width = (channel.max() - channel.min()) / BINS
        peak = channel.min() + (counts.argmax() + 0.5) * width
        shares.append(((channel - peak).abs() < channel.std() / 10).float().mean())
    return torch.stack(shares).mean().item()


def table(model: nn.Module, sites: Sites, data: CalibrationSet, bits: Bits, images: int) -> None:
    """Prints the errors of every attention."""
    values, calls = values_of(model, sites, data, images), captured_calls(model, sites, data, images)[0]
    options.head("attention", "one value", "quantized", "values as they are", "centred at the mean", "at the median")
    for site in sites.attentions:
        found, module = values[site.name], model.get_submodule(site.name)
        forms = [module, centred(module, site, found.mean(0)), centred(module, site, found.median(0).values)]
        first = f"{one_value(found):.2f}"
        for title, operands, grid in CASES:
            plan = BitPlan(Bits(16, 16), tuple((site.operand(which), bits) for which in operands))
            trial = Trial(model, site, sites, plan, calls[site.name], softmax, "mse")
            ranges = {"value": "min-max"} if "whole range" in title else {}
            errors = [f"{trial.error(form, grid, ranges) / trial.energy:.4f}" for form in forms]
            options.row(sites.family.names.short(site.name) if first else "", first, title, *errors)
            first = ""


def centred(module: nn.Module, site: AttentionSite, middle: Tensor) -> nn.Module:
    """A copy of an attention with its values centred."""
    changed = copy.deepcopy(module)
    centre_values(island(site.name, changed), site, middle)
    return changed


def main() -> None:
    parser = options.parser(__doc__)
    options.add_data(parser, measured=False)
    parser.add_argument("--n-images", type=int, default=9, help="calibration images; every third of them judges")
    parser.add_argument("--boxes", type=int, default=2, help="boxes an image")
    arguments = options.parse(parser)
    model = carsam.load_model(arguments.model)
    sites = find_sites(model).of_decoder()
    data = calibration_set(
        model, arguments.images, coco=arguments.coco, n_images=arguments.n_images, boxes_per_image=arguments.boxes
    )
    with torch.no_grad():
        table(model, sites, data, Bits.parse(arguments.bits), arguments.n_images)


if __name__ == "__main__":
    main()
