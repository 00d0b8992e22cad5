"""The walk through the network: each unit in turn gets its inputs, its ranges, its compensation, its rounding.

Two streams of activations run side by side: through the model quantized so far, and through the float model. A unit
starts from the first and is fitted to the second. Encoder stages hand their outputs on, so that no forward pass leaves
the unit; the decoder is small enough to be run up to each of its units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import SamModel

from carsam.calibrate.cache import ActivationCache, CacheSpace
from carsam.calibrate.observers import RangeRecorder
from carsam.data.calibration import CalibrationSet
from carsam.methods.base import Method
from carsam.models.sites import Sites
from carsam.quantizers import QuantizedLayer, simulate
from carsam.reconstruct.optimize import UnitData, UnitReport, optimise, relative_errors
from carsam.reconstruct.store import UnitStore, fingerprint
from carsam.reconstruct.units import (
    Unit,
    capture_unit,
    check_cover,
    decoder_input,
    first_stage_input,
    run_unit,
)
from carsam.transform.mac import MacReport

Progress = Callable[[int, int, str, int, int], None]
"""Called as ``progress(unit_index, n_units, unit_name, step, n_steps)``."""


@dataclass
class WalkReport:
    """Reports of all units and compensations, in order."""

    units: list[UnitReport] = field(default_factory=list)
    compensations: list[MacReport] = field(default_factory=list)


def _cache(space: CacheSpace, items: Iterable[dict[str, torch.Tensor]]) -> ActivationCache:
    cache = space.cache()
    with torch.no_grad():
        for item in items:
            cache.append(item)
    return cache


def variances(cache: ActivationCache) -> list[float]:
    """Variance of every tensor over all items of a cache."""
    names = list(cache.get(0, torch.device("cpu")))
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in names}
    for index in range(len(cache)):
        for name, value in cache.get(index, torch.device("cpu")).items():
            sums[name] += torch.stack(
                [value.sum(dtype=torch.float64), value.double().square().sum(), torch.tensor(value.numel())]
            )
    result = []
    for total, square, count in (sums[name].tolist() for name in names):
        result.append(max(square / count - (total / count) ** 2, 1e-12))
    return result


class Walk:
    """Reconstructs a model unit by unit.

    Args:
        model: The model with quantized layers, grids of weights fitted.
        reference: The float model.
        sites: Their sites.
        method: Gives units, settings and preparations.
        data: Calibration images with boxes.
        seed: Of everything random.
        device: Where units run.
        base_key: Fingerprint of everything that decides the result before the first unit.
        store: Finished units.
        space: Budget of the caches.
        progress: Called as work goes on.
    """

    def __init__(
        self,
        model: SamModel,
        reference: SamModel,
        sites: Sites,
        method: Method,
        data: CalibrationSet,
        *,
        seed: int,
        device: torch.device,
        base_key: str,
        store: UnitStore,
        space: CacheSpace,
        progress: Progress | None = None,
    ):
        self.model, self.reference, self.sites, self.method, self.data = model, reference, sites, method, data
        self.seed, self.device, self.key, self.store, self.space = seed, device, base_key, store, space
        self.progress = progress or (lambda *_: None)
        self.units = method.units(sites)
        check_cover(self.units, sites)
        self.report = WalkReport()

    def run(self) -> WalkReport:
        """Walks through all units; afterwards every weight in them is an integer."""
        quantized, floating = self._encoder()
        self._decoder(quantized, floating)
        return self.report

    def _encoder(self) -> tuple[ActivationCache, ActivationCache]:
        device = self.device
        pixels = (image.pixel_values.to(device) for image in self.data.images)
        floating = quantized = _cache(
            self.space, ({"hidden_states": first_stage_input(self.reference, value)} for value in pixels)
        )
        indices = range(len(self.data.images))
        for unit in [unit for unit in self.units if unit.stage != self.sites.decoder]:
            targets = _cache(
                self.space,
                ({"hidden_states": run_unit(self.reference, unit, floating.get(i, device))[0]} for i in indices),
            )
            self._unit(unit, UnitData(quantized, floating, targets, variances(targets)))
            with simulate(weights=True, activations=True):
                quantized = _cache(
                    self.space,
                    ({"hidden_states": run_unit(self.model, unit, quantized.get(i, device))[0]} for i in indices),
                )
            floating = targets
        return quantized, floating

    def _decoder(self, quantized: ActivationCache, floating: ActivationCache) -> None:
        def stage_inputs(model: SamModel, embeddings: ActivationCache) -> ActivationCache:
            return _cache(
                self.space,
                (
                    decoder_input(model, embeddings.get(i, self.device)["hidden_states"], image.boxes.to(self.device))
                    for i, image in enumerate(self.data.images)
                ),
            )

        streams = {
            "quantized": (self.model, stage_inputs(self.model, quantized)),
            "floating": (self.reference, stage_inputs(self.reference, floating)),
        }
        indices = range(len(self.data.images))

        def captured(stream: str, unit: Unit) -> ActivationCache:
            model, inputs = streams[stream]
            transformer = model.get_submodule(self.sites.decoder)

            def capture(index: int) -> dict[str, torch.Tensor]:
                arguments = {"attention_similarity": None, **inputs.get(index, self.device)}
                return capture_unit(model, unit, lambda: transformer(**arguments))

            return _cache(self.space, (capture(i) for i in indices))

        for unit in [unit for unit in self.units if unit.stage == self.sites.decoder]:
            with simulate(weights=True, activations=True):
                unit_inputs = captured("quantized", unit)
            float_inputs = captured("floating", unit)
            targets = _cache(
                self.space,
                (dict(zip("abcd", run_unit(self.reference, unit, float_inputs.get(i, self.device)))) for i in indices),
            )
            self._unit(unit, UnitData(unit_inputs, float_inputs, targets, variances(targets)))

    def _unit(self, unit: Unit, data: UnitData) -> None:
        number, method = self.units.index(unit), self.method
        settings = method.reconstruction_for(unit)
        steps = method.steps_for(unit, self.sites)
        self.key = fingerprint(self.key, unit.name, unit.scope, method.unit_settings(unit, self.sites))
        self.progress(number, len(self.units), unit.name, 0, steps)
        finished = self.store.load(self.key, self.model)
        if finished is None:
            self._observe(unit.modules(self.model), unit, data)

            def refit(module: nn.Module) -> None:
                fit_weights(module, method.weight_observer)
                self._observe([module], unit, data)

            mac = method.prepare_unit(self.model, unit, data, self.sites, refit, self.device)
            if settings is None:
                report = UnitReport(unit.name, before=relative_errors(self.model, unit, data, self.device))
                for layer in quantized_layers(unit.modules(self.model)):
                    layer.freeze()
            else:
                report = optimise(
                    self.model,
                    unit,
                    data,
                    settings,
                    steps=steps,
                    seed=self.seed,
                    device=self.device,
                    progress=lambda step: self.progress(number, len(self.units), unit.name, step, steps),
                )
            finished = report, mac
            self.store.save(self.key, self.model, unit, report, mac)
        self.report.units.append(finished[0])
        self.report.compensations.extend(finished[1])

    def _observe(self, modules: list[nn.Module], unit: Unit, data: UnitData) -> None:
        """Ranges of some modules of a unit, from the quantized-so-far inputs, activations inside in floating point."""
        recorder = RangeRecorder(modules)
        with recorder.recording(), simulate(weights=True, activations=False):
            for index in range(len(data.quantized)):
                run_unit(self.model, unit, data.quantized.get(index, self.device))
        recorder.apply(self.method.activation_observer)


def quantized_layers(modules: list[nn.Module]) -> list[QuantizedLayer]:
    """All quantized layers within some modules."""
    return [part for module in modules for part in module.modules() if isinstance(part, QuantizedLayer)]


def fit_weights(module: nn.Module, observer: str) -> None:
    """(Re)fits the weight grids within a module that are not integers yet."""
    for layer in quantized_layers([module]):
        if layer.codes is None:
            layer.fit_weight(observer)
