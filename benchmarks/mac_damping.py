"""How far MAC's compensation carries to images it did not see, by damping λ.

    python benchmarks/mac_damping.py embedded/sam-nano-256 --images IMAGES --coco INSTANCES.json

At each decoder attention of the model quantized so far (ranges observed, nearest rounding) the compensation is solved
on 32 images with several λ and undone again; printed are the relative errors of the scores (query and key branches) and
of PV (value branch) on those 32 images and on 16 others, everything quantized.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace

import torch
from torch import nn

import carsam
from carsam.bits.plan import BitPlan
from carsam.compensate import mac
from carsam.config import QuantizeConfig
from carsam.methods import car_sam

LAMBDAS = (0.001, 0.01, 0.1, 1.0, 10.0)
SOLVED_ON, HELD_OUT = 32, 16


def snapshot(attention: nn.Module) -> nn.Module:
    """A copy of an attention to come back to."""
    return copy.deepcopy(attention)


@torch.no_grad()
def restore(attention: nn.Module, saved: nn.Module) -> None:
    """Puts weights, grids and ranges back."""
    attention.load_state_dict(saved.state_dict())
    for name in ("q_proj", "k_proj", "v_proj"):
        attention.get_submodule(name).fit_weight()


def sweep(attention, name, runs, settings, **options):
    """Stands in for ``compensate_attention``: tries every λ on both kinds of branch, and leaves nothing changed."""
    solve, held_out = runs[:SOLVED_ON], list(mac.attention_calls(attention, runs[SOLVED_ON:]))
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    original = [mac.projection_matrix(layer, attention.num_attention_heads).clone() for layer in layers]
    before = mac.attention_errors(attention, held_out, original)
    saved = snapshot(attention)
    for branch, which in (("QK", 0), ("V", 1)):
        seen, unseen, change = [], [], []
        for lam in LAMBDAS:
            chosen = replace(
                settings,
                damping=lam,
                value_damping=lam,
                query=branch == "QK",
                key=branch == "QK",
                value=branch == "V",
            )
            report = mac.compensate_attention(attention, name, solve, chosen, **options)
            start, end = (report.scores, report.output)[which]
            seen.append(f"{end:.4f}")
            unseen.append(f"{mac.attention_errors(attention, held_out, original)[which]:.4f}")
            change.append(f"{max(report.change.values()):.2f}")
            restore(attention, saved)
        short = name.removeprefix("mask_decoder.transformer.")
        print(f"| {short} | {branch} | 32 seen | {start:.4f} | {' | '.join(seen)} |")
        print(f"| | | 16 held out | {before[which]:.4f} | {' | '.join(unseen)} |")
        print(f"| | | ‖D‖/‖W‖ | | {' | '.join(change)} |", flush=True)
    return mac.MacReport(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--images", required=True)
    parser.add_argument("--coco", required=True)
    parser.add_argument("--bits", default="w4a4")
    arguments = parser.parse_args()
    BitPlan.parse(arguments.bits)
    model = carsam.load_model(arguments.model)
    count = SOLVED_ON + HELD_OUT
    data = carsam.calibration_set(model, arguments.images, coco=arguments.coco, n_images=count, minimum=count)
    print("| attention | branch | images | without | " + " | ".join(f"λ {lam:g}" for lam in LAMBDAS) + " |")
    print("| --- | --- | --- | --- |" + " --- |" * len(LAMBDAS))
    original = car_sam.compensate_attention
    car_sam.compensate_attention = sweep
    try:
        no_steps = {"reconstruction": {"steps": 0, "decoder_steps": 0}, "granularity": "module"}
        carsam.quantize(model, data, QuantizeConfig("car-sam", no_steps, arguments.bits))
    finally:
        car_sam.compensate_attention = original


if __name__ == "__main__":
    main()
