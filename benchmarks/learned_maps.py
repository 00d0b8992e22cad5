"""What maps of heads win at each decoder attention: none, in closed form, and learned, by the output's squared error.

    python benchmarks/learned_maps.py runs/litemedsam/lite_medsam.pth --images medical/calibration/images \\
        --coco medical/calibration/instances.json

Every attention alone on the float model's inputs, weights in floating point; relative squared error of its output on
images that neither ranges nor maps saw (every third). Q and K alone in 4 bits, and then Q, K, V, P (row-maximum codes)
and the output projection's input.
"""

from __future__ import annotations

import options
import torch

from carsam.bits.plan import BitPlan
from carsam.models.family import find_sites
from carsam.models.load import load_model
from carsam.models.sites import OPERANDS
from carsam.prompts.calibration import calibration_set
from carsam.quantizers import softmax_grids
from carsam.transform.calls import captured_calls
from carsam.transform.learned_maps import Learner, Maps, starts
from carsam.transform.operands import heads_of

QUERY_KEY = {"*.query": "w16a4", "*.key": "w16a4"}
CASES = {"Q and K": BitPlan.parse("w16a16", QUERY_KEY), "all": BitPlan.parse("w16a4")}


def main() -> None:
    parser = options.parser(__doc__)
    options.add_data(parser, measured=False)
    parser.add_argument("--n-images", type=int, default=18, help="of which every third judges")
    parser.add_argument("--boxes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    arguments = options.parse(parser)
    model = load_model(arguments.model)
    sites = find_sites(model).of_decoder()
    data = calibration_set(
        model, arguments.images, coco=arguments.coco, n_images=arguments.n_images, boxes_per_image=arguments.boxes
    )
    calls, _ = captured_calls(model, sites, data, arguments.n_images)
    options.head("attention", "in 4 bits", "no map", "closed form", "learned", "steps alone")
    for site in sites.attentions:
        for case, plan in CASES.items():
            learner = Learner(
                model, site, sites, plan, calls[site.name], lambda g, _s, b: softmax_grids()[g](b), "row-max", "mse", {}
            )
            heads = heads_of(model, site)
            operands = {which: learner.statistics[site.operand(which)] for which in OPERANDS[:3]}
            errors, begun = [], starts(model, site, operands, heads)
            for start in begun:
                learner.observe(Maps(site, heads, *start).to(learner.device))
                errors.append(learner.error(Maps(site, heads, *start).to(learner.device)))
            better = begun[min(range(len(begun)), key=errors.__getitem__)]
            for start in (better, (None, None)):
                maps = Maps(site, heads, *start).to(learner.device)
                learner.observe(maps)
                errors.append(learner.learn(maps, arguments.steps))
            with torch.no_grad():
                shares = [f"{error / learner.judged_energy:.4f}" for error in errors]
            options.row(sites.family.names.short(site.name), case, *shares)


if __name__ == "__main__":
    main()
