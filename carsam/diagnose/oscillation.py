"""Reconstruction oscillation (METHOD.md, 8 and 10): the error along the decoder, at every moment of its reconstruction.

The states between nearest rounding and the finished model are built again from both: units of the packed model are put
into the rounded one in the order in which they were reconstructed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carsam.calibrate.cache import ActivationCache, CacheSpace, cached
from carsam.diagnose.measures import RelativeError, total_variation
from carsam.diagnose.pair import Pair
from carsam.diagnose.results import Moment, Neighbour, Oscillation
from carsam.models.sites import Sites, replace_module
from carsam.prompts.calibration import CalibrationImage
from carsam.prompts.image import PROMPTS_PER_BATCH
from carsam.quantizers import simulate
from carsam.reconstruct.units import Unit

NEAREST, ENCODER = "nearest rounding", "encoder"
# The decoder starts from embeddings here.
NO_PIXELS = torch.empty(0)


@dataclass(frozen=True)
class UnitGroup:
    """Units that are put into place at once, because only whole attentions can be.

    Attributes:
        name: Name of the last unit.
        paths: Module paths that are replaced.
    """

    name: str
    paths: tuple[str, ...]

    def holds(self, path: str) -> bool:
        """Whether a module lies in the group."""
        return any(path == own or path.startswith(own + ".") for own in self.paths)


def below(sites: Sites, path: str) -> str:
    """A module path below the decoder's."""
    return path.removeprefix(sites.decoder + ".")


def unit_groups(units: list[Unit], sites: Sites) -> tuple[UnitGroup, ...]:
    """The decoder's units in order; those that share an attention become one.

    Half an attention of one model and half of another compute nothing: Q and K may be transformed together.

    Args:
        units: The units of a method.
        sites: The model's sites.
    """
    attentions = [site.name for site in sites.attentions]

    def whole(path: str) -> str:
        return next((name for name in attentions if path.startswith(name + ".")), path)

    groups: dict[tuple[str, ...], str] = {}
    for unit in units:
        if sites.in_decoder(unit.stage):
            paths = tuple(dict.fromkeys(whole(path) for path in unit.scope))
            groups.pop(paths, None)
            groups[paths] = unit.name
    return tuple(UnitGroup(name, paths) for paths, name in groups.items())


@contextmanager
def moment_outputs(model: nn.Module, sites: Sites) -> Iterator[dict[str, Tensor]]:
    """A mapping that holds, after each pass inside the block, the decoder's stream behind every part, by its name."""
    outputs: dict[str, Tensor] = {}

    def hook_for(name: str):
        def keep(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            outputs[name] = output

        return keep

    handles = [
        model.get_submodule(moment.output).register_forward_hook(hook_for(below(sites, moment.name)))
        for moment in sites.moments
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class StageErrors:
    """Measures models against the float decoder, whose stage outputs are computed once.

    Args:
        pair: The models.
        boxes: Box prompts of every image, (P, 4) in pixels of the input frame.
        embeddings: The float model's image embeddings, (1, C, h, w) on the CPU.
    """

    def __init__(self, pair: Pair, boxes: list[Tensor], embeddings: list[Tensor]):
        self.names = tuple(below(pair.sites, moment.name) for moment in pair.sites.moments)
        self._pair = pair
        _, self._decoder = pair.sites.family.parts(pair.sites, "decoder")
        self._batches = [(index, part) for index, each in enumerate(boxes) for part in each.split(PROMPTS_PER_BATCH)]
        with moment_outputs(pair.reference, pair.sites) as outputs:
            self._targets: ActivationCache = cached(CacheSpace(), self._passes(pair.reference, embeddings, outputs))

    def _passes(
        self, model: nn.Module, embeddings: list[Tensor], outputs: dict[str, Tensor]
    ) -> Iterator[dict[str, Tensor]]:
        device = self._pair.device
        for index, boxes in self._batches:
            image = CalibrationImage("", NO_PIXELS, boxes)
            inputs = self._decoder.enter(model, {"hidden_states": embeddings[index].to(device)}, image)
            for stage in self._decoder.stages:
                stage.run(model, inputs)
            yield dict(outputs)

    @torch.no_grad()
    def measure(self, model: nn.Module, embeddings: list[Tensor]) -> tuple[float, ...]:
        """Relative squared error of every stage's output, starting from a model's own image embeddings."""
        errors = {name: RelativeError() for name in self.names}
        with moment_outputs(model, self._pair.sites) as outputs, simulate(weights=True, activations=True):
            for index, values in enumerate(self._passes(model, embeddings, outputs)):
                targets = self._targets.get(index, self._pair.device)
                for name, error in errors.items():
                    error.update(values[name], targets[name])
        return tuple(error.value for error in errors.values())


def oscillation(
    pair: Pair,
    rounded: nn.Module,
    boxes: list[Tensor],
    embeddings: tuple[list[Tensor], list[Tensor], list[Tensor]],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Oscillation:
    """The decoder's error from nearest rounding to the finished model.

    Args:
        pair: The models.
        rounded: The float model rounded to nearest; its decoder's modules are replaced by the packed model's.
        boxes: Box prompts of every image, (P, 4) in pixels of the input frame.
        embeddings: Image embeddings of the float, the packed and the rounded model, each (1, C, h, w) on the CPU.
        progress: Called as ``progress(moments_done, n_moments)``.

    Returns:
        All moments; only nearest rounding, which is the packed model itself, where the method reconstructs nothing.
    """
    floating, packed, nearest = embeddings
    meter = StageErrors(pair, boxes, floating)
    groups = unit_groups(pair.method.units(pair.sites), pair.sites)
    total = len(groups) + 3 if groups else 1
    moments: list[Moment] = []

    def measure(after: str, model: nn.Module, image_embeddings: list[Tensor]) -> None:
        errors = meter.measure(model, image_embeddings)
        moments.append(Moment(after, errors, total_variation(errors)))
        progress(len(moments), total)

    if groups:
        measure(NEAREST, rounded, nearest)
        measure(ENCODER, rounded, packed)
        for group in groups:
            for path in group.paths:
                replace_module(rounded, path, pair.packed.get_submodule(path))
            measure(group.name, rounded, packed)
    final = meter.measure(pair.packed, packed)
    if not groups:
        moments.append(Moment(NEAREST, final, total_variation(final)))
    progress(total, total)
    names = meter.names
    neighbours = _neighbours(pair.sites, names, groups, moments)
    return Oscillation(names, tuple(moments), final, total_variation(final), neighbours)


def _neighbours(
    sites: Sites, stages: tuple[str, ...], groups: tuple[UnitGroup, ...], moments: list[Moment]
) -> tuple[Neighbour, ...]:
    found = []
    for stage, neighbour in sites.neighbours:
        short, other = below(sites, stage), below(sites, neighbour)
        for number, group in enumerate(groups):
            if group.holds(neighbour):
                # Moments begin with nearest rounding and the encoder.
                before, after = (moments[number + offset].errors[stages.index(short)] for offset in (1, 2))
                found.append(Neighbour(short, other, before, after))
    return tuple(found)
