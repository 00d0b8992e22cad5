"""The walk through the network: each unit in turn gets its inputs, its ranges, its compensation, its rounding.

Two streams of activations run side by side: through the model quantized so far, and through the float model. A unit
starts from the first and is fitted to the second. Encoder stages hand their outputs on, so that no forward pass leaves
the unit; the decoder is small enough to be run up to each of its units.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import SamModel

from carsam.calibrate.cache import ActivationCache, CacheSpace, cached, variances
from carsam.calibrate.observers import RangeRecorder
from carsam.compensate.mac import MacReport
from carsam.methods.base import Method
from carsam.models.sites import Sites
from carsam.prompts.calibration import CalibrationSet
from carsam.quantizers import QuantizedLayer, simulate
from carsam.reconstruct.layerwise import optimise_layers
from carsam.reconstruct.optimize import UnitData, UnitReport, optimise, relative_errors
from carsam.reconstruct.units import (
    Unit,
    capture_unit,
    check_cover,
    decoder_input,
    first_block_inputs,
    first_stage_input,
    next_stage_inputs,
    run_module,
    run_unit,
)
from carsam.run.progress import KEPT, PlannedUnit, StageProgress
from carsam.run.store import UnitStore, fingerprint

Progress = Callable[[int, int, str, int, int], None]
"""Called as ``progress(unit_index, n_units, unit_name, step, n_steps)``; see :mod:`carsam.run.progress`."""


@dataclass
class WalkReport:
    """Reports of all units, compensations and transforms, in order."""

    units: list[UnitReport] = field(default_factory=list)
    compensations: list[MacReport] = field(default_factory=list)
    transforms: list[dict[str, Any]] = field(default_factory=list)


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
        if isinstance(progress, StageProgress):
            kinds = {True: "decoder", False: "encoder"}
            progress.expect(
                [
                    PlannedUnit(unit.name, kinds[sites.in_decoder(unit.stage)], method.steps_for(unit, sites))
                    for unit in self.units
                ]
            )

    def run(self) -> WalkReport:
        """Walks through all units; afterwards every weight in them is an integer."""
        quantized, floating = self._encoder()
        self._decoder(quantized, floating)
        return self.report

    def _encoder(self) -> tuple[ActivationCache, ActivationCache]:
        device = self.device
        pixels = (image.pixel_values.to(device) for image in self.data.images)
        floating = quantized = cached(
            self.space, ({"hidden_states": first_stage_input(self.reference, value)} for value in pixels)
        )
        indices = range(len(self.data.images))
        for unit in [unit for unit in self.units if not self.sites.in_decoder(unit.stage)]:
            targets = cached(
                self.space,
                ({"hidden_states": run_unit(self.reference, unit, floating.get(i, device))[0]} for i in indices),
            )
            following = self.space.cache()
            data = UnitData(quantized, floating, targets, variances(targets))
            self._unit(unit, data, lambda outputs, cache=following: cache.append({"hidden_states": outputs[0]}))
            quantized = following
            floating = targets
        return quantized, floating

    def _decoder(self, quantized: ActivationCache, floating: ActivationCache) -> None:
        units = [unit for unit in self.units if self.sites.in_decoder(unit.stage)]
        streams = [
            _Stream(self, model, embeddings, whole=units[0].stage == self.sites.decoder)
            for model, embeddings in ((self.model, quantized), (self.reference, floating))
        ]
        for stage in dict.fromkeys(unit.stage for unit in units):
            for unit in [unit for unit in units if unit.stage == stage]:
                with simulate(weights=True, activations=True):
                    unit_inputs = streams[0].unit_inputs(unit)
                float_inputs = streams[1].unit_inputs(unit)
                targets = self._outputs(self.reference, unit, float_inputs)
                self._unit(unit, UnitData(unit_inputs, float_inputs, targets, variances(targets)))
            if stage != units[-1].stage:
                with simulate(weights=True, activations=True):
                    streams[0].advance(stage)
                streams[1].advance(stage)

    def _outputs(self, model: SamModel, unit: Unit, inputs: ActivationCache) -> ActivationCache:
        return cached(
            self.space,
            (
                {f"output_{i}": value for i, value in enumerate(run_unit(model, unit, inputs.get(index, self.device)))}
                for index in range(len(inputs))
            ),
        )

    def _unit(self, unit: Unit, data: UnitData, keep: Callable[[tuple[torch.Tensor, ...]], None] | None = None) -> None:
        """Takes one unit to its integers, or finds them in the store; ``keep`` is given its outputs afterwards."""
        number, steps = self.units.index(unit), self.method.steps_for(unit, self.sites)
        self.key = fingerprint(self.key, unit.name, unit.scope, self.method.unit_settings(unit, self.sites))
        finished = self.store.load(self.key, self.model, unit.name)
        if finished is not None:
            self.progress(number, len(self.units), unit.name + KEPT, 0, 0)
            if keep is not None:
                relative_errors(self.model, unit, data, self.device, keep)
        else:
            self.progress(number, len(self.units), unit.name, 0, steps)
            started = time.perf_counter()
            report, mac = self._quantize_unit(
                unit, data, steps, lambda step: self.progress(number, len(self.units), unit.name, step, steps)
            )
            report.after = relative_errors(self.model, unit, data, self.device, keep)
            report.seconds = time.perf_counter() - started
            finished = report, mac
            self.store.save(self.key, self.model, unit, report, mac)
        self.report.units.append(finished[0])
        self.report.compensations.extend(finished[1])

    def _quantize_unit(
        self, unit: Unit, data: UnitData, steps: int, progress: Callable[[int], None]
    ) -> tuple[UnitReport, list[MacReport]]:
        """Ranges, preparation, reconstruction of one unit; its weights are integers afterwards."""
        method, device = self.method, self.device
        self._observe(unit, data)
        mac = method.prepare_unit(self.model, unit, data, self.sites, device)
        if mac:
            self._observe(unit, data)  # what follows a changed attention sees other values
        report = UnitReport(unit.name, before=relative_errors(self.model, unit, data, device))
        settings = method.reconstruction_for(unit)
        if settings is None:
            for layer in quantized_layers(unit.modules(self.model)):
                layer.freeze()
        else:
            report.steps = steps
            options = {"steps": steps, "seed": self.seed, "device": device, "progress": progress}
            if settings.per_layer:
                layers = optimise_layers(self.model, self.reference, unit, data, settings, space=self.space, **options)
                report.steps, report.losses = steps * len(layers), [point for losses in layers for point in losses]
            else:
                report.losses = optimise(self.model, unit, data, settings, **options)
        return report, mac

    def _observe(self, unit: Unit, data: UnitData) -> None:
        """Ranges of a unit, from the quantized-so-far inputs, activations inside in floating point."""
        recorder = RangeRecorder(unit.modules(self.model))
        with recorder.recording(), simulate(weights=True, activations=False):
            for index in range(len(data.quantized)):
                run_unit(self.model, unit, data.quantized.get(index, self.device))
        recorder.apply(self.method.activation_observer)


class _Stream:
    """The decoder's inputs of one model, stage by stage.

    Args:
        walk: Gives data, device and cache space.
        model: The model that this stream runs through.
        embeddings: Its image embeddings.
        whole: The stage is the whole transformer.
    """

    def __init__(self, walk: Walk, model: SamModel, embeddings: ActivationCache, *, whole: bool):
        self.walk, self.model = walk, model

        def first(index: int) -> dict[str, torch.Tensor]:
            embedding = embeddings.get(index, walk.device)["hidden_states"]
            arguments = decoder_input(model, embedding, walk.data.images[index].boxes.to(walk.device))
            return arguments if whole else first_block_inputs(model, walk.sites, arguments)

        self.inputs = cached(walk.space, (first(index) for index in range(len(embeddings))))

    def unit_inputs(self, unit: Unit) -> ActivationCache:
        """The inputs with which the stage reaches a unit in it."""
        if unit.scope == (unit.stage,):
            return self.inputs

        def capture(index: int) -> dict[str, torch.Tensor]:
            inputs = self.inputs.get(index, self.walk.device)
            return capture_unit(self.model, unit, lambda: run_module(self.model, unit.stage, inputs))

        return cached(self.walk.space, (capture(index) for index in range(len(self.inputs))))

    def advance(self, stage: str) -> None:
        """Goes on to the stage after ``stage``."""

        def following(index: int) -> dict[str, torch.Tensor]:
            inputs = self.inputs.get(index, self.walk.device)
            return next_stage_inputs(self.walk.sites, stage, inputs, run_module(self.model, stage, inputs))

        self.inputs = cached(self.walk.space, (following(index) for index in range(len(self.inputs))))


def quantized_layers(modules: list[nn.Module]) -> list[QuantizedLayer]:
    """All quantized layers within some modules."""
    return [part for module in modules for part in module.modules() if isinstance(part, QuantizedLayer)]


def fit_weights(module: nn.Module, observer: str) -> None:
    """(Re)fits the weight grids within a module that are not integers yet."""
    for layer in quantized_layers([module]):
        if layer.codes is None:
            layer.fit_weight(observer)
