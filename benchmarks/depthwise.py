"""One 4-bit step before a depthwise convolution, or one for each channel: errors of single layers.

    python benchmarks/depthwise.py runs/litemedsam/lite_medsam.pth --images medical/calibration/images \\
        --coco medical/calibration/instances.json

Every depthwise convolution alone, on the float model's inputs, its weights in floating point: relative squared error of
its output on the last image, grids by least squared error on the others. "reach" is the largest absolute value of a
channel: the tenth part of the channels with the least, the median, and the largest.
"""

from __future__ import annotations

import options
import torch
from torch import Tensor

import carsam
from carsam.bits.plan import Bits
from carsam.models.family import find_sites
from carsam.models.sites import DEPTHWISE
from carsam.quantizers import ActivationQuantizer, ChannelQuantizer, SiteQuantizer
from carsam.transform.statistics import hooked, pass_over


@torch.no_grad()
def error(layer: torch.nn.Conv2d, quantizer: SiteQuantizer, fit: list[Tensor], judge: Tensor) -> float:
    """Relative squared error of a layer's output on maps (1, channels, h, w) with its input on a grid."""
    record = quantizer.record()
    for each in fit:
        record.update(each)
    record.fit(quantizer, "mse")
    exact = layer(judge)
    found = layer(quantizer.round(judge, quantizer.step_along(judge)))
    spread = exact - exact.mean((0, 2, 3), keepdim=True)
    return ((found - exact).square().sum() / spread.square().sum()).item()


def main() -> None:
    parser = options.parser(__doc__)
    options.add_data(parser, measured=False)
    parser.add_argument("--n-images", type=int, default=4, help="calibration images; the last one judges")
    arguments = options.parse(parser)
    model = carsam.load_model(arguments.model)
    sites, bits = find_sites(model), Bits.parse(arguments.bits).activations
    data = carsam.calibration_set(
        model, arguments.images, coco=arguments.coco, n_images=arguments.n_images, boxes_per_image=1
    )
    names = [site.name for site in sites.layers if site.role == DEPTHWISE]
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [(name, lambda x, _out, into=into: into.append(x.detach().clone())) for name, into in seen.items()]
    with hooked(model, hooks):
        for image in data.images:
            pass_over(model, sites, image)
    options.head("layer", "reach: tenth", "median", "largest", "error, one step", "a step for each channel")
    for name, maps in seen.items():
        layer = model.get_submodule(name)
        reach = torch.cat(maps[:-1]).abs().amax((0, 2, 3))
        quantizers = ActivationQuantizer(bits), ChannelQuantizer(bits, maps=1)
        errors = [error(layer, quantizer, maps[:-1], maps[-1]) for quantizer in quantizers]
        ends = (reach.quantile(0.1), reach.median(), reach.max())
        options.row(
            sites.family.names.short(name),
            *(f"{end.item():.2f}" for end in ends),
            *(f"{each:.3f}" for each in errors),
        )


if __name__ == "__main__":
    main()
