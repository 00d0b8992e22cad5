"""Seconds that MAC takes on one attention of ViT-B's decoder: 32 images × 6 prompts, 64 × 64 image tokens.

    python benchmarks/mac.py

All three branches on random weights and inputs, with everything that belongs to it: statistics, solving, fitting weight
grids and observing ranges again, and the errors before and after.
"""

from __future__ import annotations

import time

import options
import torch

from carsam.calibrate.observers import RangeRecorder
from carsam.compensate.closed_form import SOLVERS
from carsam.compensate.mac import Coupled, MacSettings, compensate_attention
from carsam.config import QuantizeConfig
from carsam.methods.base import create
from carsam.models.family import find_sites
from carsam.models.prepare import prepare_model
from carsam.models.sam.random import random_sam
from carsam.quantizers import simulate
from carsam.run.memory import peak_memory
from carsam.run.walk import fit_weights

IMAGES, PROMPTS, TOKENS, PIXELS, DIM = 32, 6, 7, 64 * 64, 256


@torch.no_grad()
def main() -> None:
    options.parse(options.parser(__doc__))
    options.head("attention", "solver", "seconds", "peak memory")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(IMAGES, PROMPTS, 1, TOKENS, DIM, generator=generator)
    image = torch.randn(IMAGES, PROMPTS, 1, PIXELS, DIM, generator=generator)
    for solver in SOLVERS:
        model = random_sam("vit-b", blocks=1)
        sites, method = find_sites(model), create("car-sam")
        prepare_model(model, sites, QuantizeConfig().bit_plan(), method.quantizer_for, method.softmax_for)
        by_name = {site.name: site for site in sites.attentions}
        # The coupled pair of the last block: each is the other's neighbour.
        image_to_token, token_to_image = (by_name[name] for name in sites.neighbours[-2])
        for site, query, key in ((token_to_image, tokens, image), (image_to_token, image, tokens)):
            attention = model.get_submodule(site.name)
            fit_weights(attention, "mse")

            def run(index: int, attention=attention, query=query, key=key):
                return attention(query=query[index], key=key[index], value=key[index])

            recorder = RangeRecorder([attention])
            with recorder.recording(), simulate(weights=True):
                for index in range(IMAGES):
                    run(index)
            recorder.apply("mse")
            runs = [lambda index=index, run=run: run(index) for index in range(IMAGES)]
            started = time.perf_counter()
            compensate_attention(Coupled.of(model, site), runs, MacSettings(value=True, solver=solver))
            seconds = time.perf_counter() - started
            memory = f"{peak_memory() / 2**30:.1f} GiB"
            options.row(site.name.rpartition(".")[2], solver, f"{seconds:.1f}", memory)


if __name__ == "__main__":
    main()
