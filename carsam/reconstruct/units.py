"""What is reconstructed at a time: units, how they are run and how their inputs are captured.

A unit maps named input tensors, each (n, ...) over blocks of the image or prompts, to named output tensors. Most units
are modules; JCAR's pair is the second half of a decoder block and has no module of its own (METHOD.md, 8). Which units
a model has, its family says (:meth:`carsam.models.family.Family.units`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from carsam.errors import ConfigError
from carsam.models.family import DECODER, GRANULARITIES, Tensors
from carsam.models.sites import Sites


@dataclass(frozen=True)
class Unit:
    """A part of the model that is reconstructed as one.

    Attributes:
        name: Unique name, also of its saved state.
        scope: Module paths whose layers and activation quantizers belong to it.
        stage: Name of the stage that it lies in, or is.
        run: Called as ``run(model, inputs)``; gives the outputs that the rest of the network reads.
        capture: Called as ``capture(model, run_stage)``; gives the inputs with which ``run_stage()``, a pass through
            the unit's stage, reaches it.
        channel_dim: The outputs' channel dimension.
        reads: Of a unit that is its whole stage, the inputs that it reads where the stage hands on others too; empty:
            all.
        outputs: Module paths that give the outputs in a pass of the whole model: one each, or one for all. Empty where
            they are not known; the masks' sensitivity to them cannot be asked for then.
    """

    name: str
    scope: tuple[str, ...]
    stage: str
    run: Callable[[nn.Module, Tensors], Tensors] = field(compare=False, repr=False)
    capture: Callable[[nn.Module, Callable[[], object]], Tensors] = field(compare=False, repr=False)
    channel_dim: int = -1
    reads: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """The unit's modules in ``model``."""
        return [model.get_submodule(path) for path in self.scope]

    def holds(self, path: str) -> bool:
        """Whether a module path lies in the unit."""
        return any(path == own or path.startswith(own + ".") for own in self.scope)


def check_granularity(granularity: str) -> None:
    """Refuses an unknown granularity.

    Raises:
        ConfigError: With the choices.
    """
    if granularity not in GRANULARITIES:
        raise ConfigError(f"unknown granularity {granularity!r}; choose from {', '.join(GRANULARITIES)}.")


def encoder_units(sites: Sites) -> list[Unit]:
    """The units of all that comes before the decoder, the image encoder and a video's memory, in the walk's order."""
    parts = [part.name for part in sites.family.parts(sites) if part.name != DECODER]
    return [unit for name in parts for unit in sites.family.units(sites, name)]


def decoder_units(sites: Sites, granularity: str) -> list[Unit]:
    """The decoder's units, in execution order.

    Args:
        sites: The model's sites.
        granularity: ``module`` (each attention, each MLP), ``pair`` (JCAR: token→image attention, MLP and image→token
            attention of a block as one), ``block`` (self-attention too) or ``decoder`` (the whole transformer).

    Raises:
        ConfigError: The granularity is unknown.
    """
    check_granularity(granularity)
    return sites.family.units(sites, DECODER, granularity)


def check_cover(units: list[Unit], sites: Sites) -> None:
    """Every site lies in exactly one unit; anything else would leave a layer in floating point, in silence."""
    for site in [site.name for site in sites.layers] + [site.name for site in sites.attentions]:
        owners = [unit.name for unit in units if unit.holds(site)]
        assert len(owners) == 1, f"{site} lies in the units {owners}"


def run_unit(model: nn.Module, unit: Unit, inputs: Tensors) -> tuple[Tensor, ...]:
    """Runs a unit on its inputs; the outputs that the rest of the network reads."""
    return tuple(unit.run(model, inputs).values())
