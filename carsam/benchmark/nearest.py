"""A packed model by nearest rounding in seconds: right in size and time, for accuracy there are better methods."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from carsam.bits.plan import BitPlan
from carsam.calibrate.observers import RangeRecorder
from carsam.models.family import family_of, find_sites
from carsam.models.forward import predict_logits
from carsam.models.prepare import prepare_model
from carsam.pack.layout import pack
from carsam.quantizers import ActivationQuantizer, UniformSoftmax, simulate


@torch.no_grad()
def nearest(model: PreTrainedModel, bits: str, pixels: Sequence[np.ndarray]) -> PreTrainedModel:
    """A packed copy of a float model; ranges are the ends seen on images, with one box in the middle of each.

    Args:
        model: Float, on the CPU.
        bits: As ``w4a4``.
        pixels: Preprocessed images (1, 3, S, S).
    """
    made = copy.deepcopy(model)
    family, sites = family_of(made), find_sites(made)
    prepare_model(
        made,
        sites,
        BitPlan.parse(bits),
        lambda site, width, role: ActivationQuantizer(width),
        lambda site, width: UniformSoftmax(width, range_by="observer"),
    )
    recorder = RangeRecorder([made])
    side = family.image_size(made)
    box = torch.tensor([[0.25, 0.25, 0.75, 0.75]]) * side
    with recorder.recording(), simulate(weights=False, activations=False):
        for image in pixels:
            embedding = family.encode_image(made, torch.from_numpy(image))
            predict_logits(made, embedding, boxes=box)
    recorder.apply("min-max")
    for site in sites.layers:
        layer = made.get_submodule(site.name)
        layer.fit_weight("min-max")
        layer.freeze()
    return pack(made, sites).eval()
