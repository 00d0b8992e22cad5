"""Turns a quantized model into one that runs on integers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from carsam.errors import ConfigError
from carsam.models.family import family_of, find_sites
from carsam.models.sites import replace_module
from carsam.runtime.linear import IntegerLinear, why_not


@dataclass
class Converted:
    """What of a model runs on integers.

    Attributes:
        linears: Linears that do.
        modules: Larger modules that do, by class name (an attention, an MLP).
        simulated: Quantized layers that are still simulated in floating point, counted by reason.
    """

    linears: int = 0
    modules: Counter[str] = field(default_factory=Counter)
    simulated: Counter[str] = field(default_factory=Counter)


@torch.no_grad()
def integer_linears(model: PreTrainedModel, *, packed: bool = True) -> Converted:
    """Puts integer layers, in place, where a quantized model's Linears are.

    What is left (convolutions, grids with a step for groups of channels) stays simulated, and computes what it did.

    Args:
        model: From :func:`carsam.load` or :func:`carsam.quantize`.
        packed: Keep weights of at most 4 bits two a byte in memory, and unpack them at each multiplication.

    Raises:
        ConfigError: No layer of the model can run on integers.
    """
    family, sites, done = family_of(model), find_sites(model), Converted()
    for site in sites.layers:
        layer = model.get_submodule(site.name)
        if reason := why_not(layer):
            done.simulated[reason] += 1
            continue
        replace_module(model, site.name, IntegerLinear.of(layer, packed=packed))
        done.linears += 1
    if not done.linears:
        why = next(iter(done.simulated), "it has no quantized layer")
        raise ConfigError(f"no layer of this {type(model).__name__} can run on integers: {why}.")
    for name, module in list(model.named_modules()):
        whole = family.integer_module(module)
        if whole is not None:
            replace_module(model, name, whole)
            done.modules[type(whole).__name__] += 1
    return done
