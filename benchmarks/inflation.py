"""By how much scores inflate when a model is measured before it is what its file will hold (METHOD.md, 11).

    python benchmarks/inflation.py embedded/sam-nano-256 \
        --images ../shared/data/coco-train100/images --coco ../shared/data/coco-train100/instances.json \
        --eval-images ../shared/data/coco-val50/images --eval-coco ../shared/data/coco-val50/instances.json

One quantization, measured five ways: the float model; the packed file loaded back, which is what carsam reports; and
the same learned state with the two errors of public code, input quantizers left at drop probability 0.5 and learned
rounding made hard in the first layer of each unit only. tests/test_honest_evaluation.py shows that carsam cannot report
the latter.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import options
import torch
from torch import Tensor, nn

import carsam
from carsam.config import CalibrationConfig, QuantizeConfig
from carsam.evaluate.coco_metrics import evaluate_coco
from carsam.methods.base import create, registry
from carsam.models.family import find_sites
from carsam.quantizers import QuantizedLayer, simulate
from carsam.quantizers.rounding import rectified_sigmoid
from carsam.reconstruct.units import Unit
from carsam.run.context import Hooks

# α, and the (base, span) that it rounds between, by layer.
Rounding = dict[str, tuple[Tensor, tuple[Tensor, Tensor]]]


class BeforePacking(Hooks):
    """Keeps what a run has in hand when it packs: the model with integer weights, and the rounding that it learned."""

    def __init__(self) -> None:
        super().__init__(learned=self._learned, before_packing=self._packing)
        self.rounding: Rounding = {}
        self.model: nn.Module | None = None

    def _learned(self, model: nn.Module, unit: Unit) -> None:
        for path in unit.scope:
            for name, layer in model.get_submodule(path).named_modules(prefix=path):
                if isinstance(layer, QuantizedLayer) and layer.alpha is not None:
                    self.rounding[name] = (layer.alpha.detach().clone(), layer._span)

    def _packing(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)


def left_soft(model: nn.Module, rounding: Rounding, method: str, settings: dict) -> nn.Module:
    """The model with α still in place in all but the first layer of each unit."""
    model = copy.deepcopy(model)
    names = {module: name for name, module in model.named_modules()}
    for unit in create(method, settings).units(find_sites(model)):
        layers = [m for module in unit.modules(model) for m in module.modules() if isinstance(m, QuantizedLayer)]
        for layer in layers[1:]:
            if names[layer] in rounding:
                alpha, layer._span = rounding[names[layer]]
                layer.alpha, layer.codes = nn.Parameter(alpha, requires_grad=False), None
    return model


def distance_from_integers(rounding: Rounding) -> float:
    """Mean of |h(α) − its integer|, in steps of the grid: how soft the learned rounding still is."""
    h = torch.cat([rectified_sigmoid(alpha).flatten() for alpha, _ in rounding.values()])
    return float(torch.minimum(h, 1 - h).mean())


def main() -> None:
    parser = options.parser(__doc__)
    options.add_data(parser, measured=True)
    parser.add_argument("--method", default="qdrop", choices=sorted(registry()))
    parser.add_argument("--limit", type=int, help="measure on the first images only")
    arguments = options.parse(parser)
    settings = options.steps_of(arguments)
    data = CalibrationConfig(arguments.images, arguments.coco, arguments.n_images, seed=arguments.seed)
    config = QuantizeConfig(arguments.method, settings, arguments.bits, calibration=data)

    floating = carsam.load_model(arguments.model)
    kept = BeforePacking()
    with tempfile.TemporaryDirectory() as folder:
        packed = carsam.quantize(floating, arguments.images, config, out=Path(folder) / "packed", hooks=kept).model
    hard, rounding = kept.model, kept.rounding
    if not rounding:
        parser.error(f"{arguments.method} learns no rounding; choose a method with reconstruction.")
    soft = left_soft(hard, rounding, arguments.method, settings)

    subjects = {
        "float": (floating, {}),
        "packed file (what is reported)": (packed, {}),
        "inputs left at drop 0.5": (hard, {"weights": True, "activations": True, "drop": 0.5}),
        "rounding soft but for each unit's first layer": (soft, {"weights": True, "activations": True}),
        "both": (soft, {"weights": True, "activations": True, "drop": 0.5}),
    }
    print(
        f"{arguments.method} at {arguments.bits.upper()}, {arguments.n_images} calibration images, seed "
        f"{arguments.seed}; h(α) is {distance_from_integers(rounding):.3f} steps from an integer in the mean.\n"
    )
    options.head("measured", "segm AP", "box AP", "mean IoU", "loss of mean IoU")
    losses: list[float] = []
    for name, (model, state) in subjects.items():
        torch.manual_seed(arguments.seed)
        with simulate(**state):
            scores = evaluate_coco(model, arguments.eval_coco, arguments.eval_images, limit=arguments.limit)
        losses.append(losses[0] - scores.mean_iou if losses else scores.mean_iou)
        # The first entry is the float score, the second the honest loss that the others are shares of.
        loss = f"{losses[-1]:.1f} ({losses[-1] / losses[1]:.0%})" if len(losses) > 1 else ""
        options.row(name, *(f"{value:.1f}" for value in (scores.segm_ap, scores.box_ap, scores.mean_iou)), loss)


if __name__ == "__main__":
    main()
