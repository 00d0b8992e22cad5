"""How far MAC's compensation carries to images it did not see, by damping λ.

    python benchmarks/mac_damping.py embedded/sam-nano-256 --images IMAGES --coco INSTANCES.json

At each decoder attention of the model quantized so far (ranges observed, nearest rounding) the compensation is solved
on 32 images with several λ and undone again; printed are the relative errors of the scores (query and key branches) and
of PV (value branch) on those 32 images and on 16 others, everything quantized.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import options
import torch
from torch import nn

import carsam
from carsam.bits.plan import BitPlan
from carsam.compensate import mac
from carsam.config import QuantizeConfig
from carsam.methods.car_sam import CarSam

LAMBDAS = (0.001, 0.01, 0.1, 1.0, 10.0)
SOLVED_ON, HELD_OUT = 32, 16


@torch.no_grad()
def restore(attention: mac.Coupled, saved: nn.Module) -> None:
    """Puts weights, grids and ranges back."""
    attention.module.load_state_dict(saved.state_dict())
    for layer in attention.layers.values():
        layer.fit_weight()


@dataclass(frozen=True)
class Sweep(CarSam):
    """CAR-SAM that tries every λ on both kinds of branch at each attention, and leaves nothing changed."""

    name: ClassVar[str] = "mac-sweep"

    def compensate(self, attention: mac.Coupled, runs: list, floating: list | None = None) -> mac.MacReport:
        solve, held_out = runs[:SOLVED_ON], list(mac.attention_calls(attention, runs[SOLVED_ON:]))
        original = attention.matrices()
        before = mac.attention_errors(attention, held_out, original)
        saved = copy.deepcopy(attention.module)
        for branch, which in (("QK", 0), ("V", 1)):
            seen, unseen, change = [], [], []
            for lam in LAMBDAS:
                chosen = replace(
                    self.mac,
                    damping=lam,
                    value_damping=lam,
                    query=branch == "QK",
                    key=branch == "QK",
                    value=branch == "V",
                )
                report = replace(self, mac=chosen).compensate_once(attention, solve)
                start, end = (report.scores, report.output)[which]
                seen.append(f"{end:.4f}")
                unseen.append(f"{mac.attention_errors(attention, held_out, original)[which]:.4f}")
                change.append(f"{max(report.change.values()):.2f}")
                restore(attention, saved)
            options.row(short_name(attention.name), branch, "32 seen", f"{start:.4f}", *seen)
            options.row("", "", "16 held out", f"{before[which]:.4f}", *unseen)
            options.row("", "", "‖D‖/‖W‖", "", *change)
        return mac.MacReport(attention.name)

    def compensate_once(self, attention: mac.Coupled, runs: list) -> mac.MacReport:
        """What CAR-SAM does."""
        return super().compensate(attention, runs)


def short_name(path: str) -> str:
    """The last words of an attention's path: block and name."""
    return ".".join(path.split(".")[-3:])


def main() -> None:
    parser = options.parser(__doc__)
    options.add_data(parser, measured=False)
    arguments = options.parse(parser)
    BitPlan.parse(arguments.bits)
    model = carsam.load_model(arguments.model)
    count = SOLVED_ON + HELD_OUT
    data = carsam.calibration_set(model, arguments.images, coco=arguments.coco, n_images=count, minimum=count)
    options.head("attention", "branch", "images", "without", *(f"λ {lam:g}" for lam in LAMBDAS))
    no_steps = {"reconstruction": {"steps": 0, "decoder_steps": 0}, "granularity": "module"}
    carsam.quantize(model, data, QuantizeConfig(Sweep.name, no_steps, arguments.bits))


if __name__ == "__main__":
    main()
