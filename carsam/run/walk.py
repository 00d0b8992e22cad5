"""The walk through the network: each unit in turn gets its inputs, its ranges, its compensation, its rounding.

Two streams of activations run side by side: through the model quantized so far, and through the float model. A unit
starts from the first and is fitted to the second. The walk knows no model: parts, stages and units are the family's.
Where a unit is its whole stage, its outputs are handed on, so that no further pass is needed; a stage of several units
is run up to each of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from carsam.calibrate.cache import ActivationCache, cached, variances
from carsam.calibrate.observers import RangeRecorder
from carsam.calibrate.sensitivity import MaskSensitivity
from carsam.compensate.acnr import AcnrReport
from carsam.compensate.mac import MacReport
from carsam.compensate.refit import RefitReport
from carsam.methods.base import Method
from carsam.models.family import DECODER, ENCODED, Part, Stage, Tensors
from carsam.models.forward import encode_image
from carsam.models.sites import Sites
from carsam.prompts.calibration import CalibrationImage, CalibrationSet
from carsam.quantizers import QuantizedLayer, SiteQuantizer, simulate
from carsam.reconstruct.layerwise import optimise_layers
from carsam.reconstruct.masks import MaskReport, MaskWeights, mask_weights, tune_on_masks
from carsam.reconstruct.optimize import ReconstructionSettings, UnitData, UnitReport, relative_errors, unit_seed
from carsam.reconstruct.tuning import TuningReport, tune
from carsam.reconstruct.units import Unit, check_cover, run_unit
from carsam.run.context import RunContext
from carsam.run.memory import release_memory
from carsam.run.progress import KEPT, PlannedUnit, StageProgress
from carsam.run.store import fingerprint

logger = logging.getLogger(__name__)

Following = Callable[[nn.Module, Tensors, Tensors], Tensors]

# What is tuned after the units: the decoder on its masks, and the model as a whole.
MASKS, WHOLE = "masks", "whole model"


@dataclass
class WalkReport:
    """Reports of all units, compensations and transforms, in order."""

    units: list[UnitReport] = field(default_factory=list)
    compensations: list[MacReport | AcnrReport | RefitReport] = field(default_factory=list)
    transforms: list[dict[str, Any]] = field(default_factory=list)
    masks: MaskReport | None = None
    tuning: TuningReport | None = None


class Walk:
    """Reconstructs a model unit by unit.

    Args:
        model: The model with quantized layers, grids of weights fitted.
        reference: The float model.
        sites: Their sites; without the image encoder's, that is run in floating point as a whole.
        method: Gives units, settings and preparations.
        data: Calibration images with boxes.
        base_key: Fingerprint of everything that decides the result before the first unit.
        context: Device, seed, store, cache space, progress.
        sensitivity: What the masks make of errors, where the method asked.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        sites: Sites,
        method: Method,
        data: CalibrationSet,
        base_key: str,
        context: RunContext,
        sensitivity: MaskSensitivity | None = None,
    ):
        self.model, self.reference, self.sites, self.method, self.data = model, reference, sites, method, data
        self.key, self.context, self.sensitivity = base_key, context, sensitivity
        self.device = context.device
        self.progress = context.progress or (lambda *_: None)
        self.units = method.units(sites)
        check_cover(self.units, sites)
        self.parts = sites.family.parts(sites, method.granularity)
        self.report = WalkReport()
        # Embeddings by both models, once the walk has reached the decoder.
        self.encoded: tuple[ActivationCache, ActivationCache] | None = None
        self._decoding: bool | None = None
        kinds = {stage.name: part.name for part in self.parts for stage in part.stages}
        short = sites.family.names.short
        # What is gone through: the units, then what is tuned once they are finished.
        self.planned = [
            PlannedUnit(unit.name, kinds[unit.stage], method.steps_for(unit, sites), short(unit.name))
            for unit in self.units
        ]
        last = method.reconstruction_for(self.units[-1]) if self.units else None
        if last is not None and last.mask_steps:
            self.planned.append(PlannedUnit(MASKS, MASKS, last.mask_steps))
        if method.tuning_settings is not None and method.tuning_settings.steps:
            self.planned.append(PlannedUnit(WHOLE, WHOLE, method.tuning_settings.steps))
        if isinstance(context.progress, StageProgress):
            context.progress.expect(self.planned)

    def run(self) -> WalkReport:
        """Walks through all units; afterwards every weight in them is an integer."""
        streams: tuple[_Stream, _Stream] | None = None
        for part in self.parts:
            streams = self._enter(part, streams)
            for stage in part.stages:
                self._stage(stage, *streams, last=stage is part.stages[-1], last_part=part is self.parts[-1])
                release_memory()  # the inputs of the stage, of which its units kept more
        self._tune_on_masks()
        self._tune()
        return self.report

    def _enter(self, part: Part, before: tuple[_Stream, _Stream] | None) -> tuple[_Stream, _Stream]:
        """Both streams at the first stage of a part."""
        if before is None:
            # Nothing is quantized before the first stage: both models compute the same.
            first = self._cached(lambda i: self._first(part, self.data.images[i]))
            return _Stream(self.model, first), _Stream(self.reference, first)

        if part.name == DECODER:
            self.encoded = before[0].inputs, before[1].inputs

        def entered(stream: _Stream) -> _Stream:
            inputs = stream.inputs
            enter = part.enter
            # A part may run others to find its inputs, also some whose turn comes later: those are still in floating
            # point, their weights and their activations.
            with simulate(activations=True, settled=True):
                return _Stream(
                    stream.model,
                    self._cached(lambda i: enter(stream.model, inputs.get(i, self.device), self.data.images[i])),
                )

        return entered(before[0]), entered(before[1])

    def _first(self, part: Part, image: CalibrationImage) -> Tensors:
        """Inputs of the first stage; of a part that stays in floating point as a whole, what it gives."""
        if part.stages:
            return part.enter(self.reference, {}, image)
        return {ENCODED: encode_image(self.reference, image.pixel_values)}

    def _stage(self, stage: Stage, quantized: _Stream, floating: _Stream, *, last: bool, last_part: bool) -> None:
        """Reconstructs the units of a stage, and takes both streams behind it."""
        units = [unit for unit in self.units if unit.stage == stage.name]
        follows = not (last and last_part)
        following = None if last else stage.following
        if len(units) == 1 and units[0].scope == (stage.name,):
            self._whole(units[0], quantized, floating, following, follows=follows)
            return
        for unit in units:
            with simulate(weights=True, activations=True):
                unit_inputs = self._reach(unit, stage, quantized)
            float_inputs = self._reach(unit, stage, floating)
            self._unit(unit, self._data(unit, unit_inputs, float_inputs))
        if follows:
            with simulate(weights=True, activations=True):
                quantized.inputs = self._behind(stage, quantized, following)
            floating.inputs = self._behind(stage, floating, following)

    def _whole(
        self, unit: Unit, quantized: _Stream, floating: _Stream, following: Following | None, *, follows: bool
    ) -> None:
        """A unit that is its whole stage: what it gives, quantized and float, is what follows."""
        inputs, float_inputs = (stream.inputs.only(unit.reads) for stream in (quantized, floating))
        data = self._data(unit, inputs, float_inputs)
        targets = data.targets
        if not follows:
            self._unit(unit, data)
            return
        behind = self.context.space.cache()

        def keep(outputs: tuple[Tensor, ...]) -> None:
            named = dict(zip(targets.names, outputs))
            if following is not None:
                named = following(self.model, quantized.inputs.get(len(behind), self.device), named)
            behind.append(named)

        self._unit(unit, data, keep)
        quantized.inputs = behind
        if following is None:
            floating.inputs = targets  # the same tensors, kept once
        else:
            before = floating.inputs
            floating.inputs = self._cached(lambda i: self._follow(unit, following, before.get(i, self.device)))

    def _follow(self, unit: Unit, following: Following, inputs: Tensors) -> Tensors:
        return following(self.reference, inputs, unit.run(self.reference, inputs))

    def _reach(self, unit: Unit, stage: Stage, stream: _Stream) -> ActivationCache:
        """The inputs with which a stage reaches a unit in it."""
        if unit.scope == (stage.name,):
            return stream.inputs

        def capture(index: int) -> Tensors:
            inputs = stream.inputs.get(index, self.device)
            return unit.capture(stream.model, lambda: stage.run(stream.model, inputs))

        return self._cached(capture)

    def _behind(self, stage: Stage, stream: _Stream, following: Following | None) -> ActivationCache:
        def run(index: int) -> Tensors:
            inputs = stream.inputs.get(index, self.device)
            return stage.run(stream.model, inputs) if following is None else stage.step(stream.model, inputs)

        return self._cached(run)

    def _data(self, unit: Unit, inputs: ActivationCache, float_inputs: ActivationCache) -> UnitData:
        """Inputs and targets of a unit, and what the method keeps of the pass that gives the targets."""
        rows = self.method.float_rows(self.reference, unit, self.sites)
        with nullcontext() if rows is None else rows.watching():
            targets = self._cached(lambda index: unit.run(self.reference, float_inputs.get(index, self.device)))
        return UnitData(inputs, float_inputs, targets, variances(targets), rows=rows)

    def _cached(self, make: Callable[[int], Tensors]) -> ActivationCache:
        return cached(self.context.space, (make(index) for index in range(len(self.data.images))))

    def _unit(self, unit: Unit, data: UnitData, keep: Callable[[tuple[Tensor, ...]], None] | None = None) -> None:
        """Takes one unit to its integers, or finds them in the store; ``keep`` is given its outputs afterwards."""
        with self.context.hooks.work("unit"):
            self._settle(unit, data, keep)
        release_memory()

    def _settle(self, unit: Unit, data: UnitData, keep: Callable[[tuple[Tensor, ...]], None] | None) -> None:
        number, steps = self.units.index(unit), self.method.steps_for(unit, self.sites)
        # Grids too: a unit kept with one step for an input must not be given to a model with a step for each channel.
        grids = {name: quantizer.spec() for name, quantizer in self._quantizers(unit)}
        settings = self.method.unit_settings(unit, self.sites)
        self.key = fingerprint(self.key, unit.name, unit.scope, settings, grids)
        finished = self.context.store.load(self.key, self.model, unit.name)
        if finished is not None:
            self.context.hooks.unit_found(unit.name)
            self.progress(number, len(self.planned), unit.name + KEPT, 0, 0)
            if keep is not None:
                relative_errors(self.model, unit, data, self.device, keep)
        else:
            self.progress(number, len(self.planned), unit.name, 0, steps)
            started = time.perf_counter()
            report, mac = self._quantize_unit(
                unit, data, steps, lambda step: self.progress(number, len(self.planned), unit.name, step, steps)
            )
            report.after = relative_errors(self.model, unit, data, self.device, keep)
            # Where nothing is learned, weights are rounded already: one pass tells both.
            report.before = report.before or report.after
            report.seconds = time.perf_counter() - started
            finished = report, mac
            self.context.store.save(self.key, self.model, unit, report, mac)
        self.report.units.append(finished[0])
        self.report.compensations.extend(finished[1])

    def _quantizers(self, unit: Unit) -> Iterator[tuple[str, SiteQuantizer]]:
        for path, module in zip(unit.scope, unit.modules(self.model)):
            for name, each in module.named_modules():
                if isinstance(each, SiteQuantizer):
                    yield f"{path}.{name}", each

    def _quantize_unit(
        self, unit: Unit, data: UnitData, steps: int, progress: Callable[[int], None]
    ) -> tuple[UnitReport, list[MacReport | AcnrReport | RefitReport]]:
        """Ranges, preparation, reconstruction of one unit; its weights are integers afterwards."""
        method, device = self.method, self.device
        self._observe(unit, data)
        data.sensitivity = self.sensitivity
        mac = method.prepare_unit(self.model, unit, data, self.sites, device)
        if any(getattr(each, "moves_ranges", True) for each in mac):
            self._observe(unit, data)  # what follows a changed attention sees other values
        report = UnitReport(unit.name)
        settings = method.reconstruction_for(unit)
        if settings is None:
            for layer in quantized_layers(unit.modules(self.model)):
                layer.freeze()
        else:
            report.before = relative_errors(self.model, unit, data, device)
            report.steps = steps
            if settings.mask_weight > 0 and steps:
                if self.encoded is not None:
                    data.weights = self._mask_weights(unit, data, settings)
                elif self.sensitivity is not None:
                    data.weights = self.sensitivity.outputs.get(unit.stage)
            options = {
                "steps": steps,
                "seed": self.context.seed,
                "device": device,
                "progress": progress,
                "learned": self.context.hooks.learned,
            }
            if settings.per_layer:
                space = self.context.space
                layers = optimise_layers(self.model, self.reference, unit, data, settings, space=space, **options)
                report.steps, report.losses = steps * len(layers), [point for losses in layers for point in losses]
            else:
                report.losses = self.context.hooks.optimise(self.model, unit, data, settings, **options)
        method.finish_unit(self.model, unit, data, self.sites, device)
        return report, mac

    def _mask_weights(self, unit: Unit, data: UnitData, settings: ReconstructionSettings) -> MaskWeights | None:
        """What the masks make of errors in a decoder unit's outputs; None where that is optional and cannot be told."""
        if settings.mask_optional and not self._decodes():
            return None
        return mask_weights(
            self.reference,
            unit,
            data.targets,
            data.variances,
            self.encoded[1],
            self.data.images,
            self.sites.family,
            space=self.context.space,
            device=self.device,
            seed=unit_seed(self.context.seed, unit.name),
        )

    def _decodes(self) -> bool:
        """Whether the family decodes with gradients; says once where it does not."""
        if self._decoding is None:
            first = self.encoded[1].get(0, self.device)
            with torch.no_grad():
                found = self.sites.family.decode(self.reference, first, self.data.images[0])
            self._decoding = found is not None
            if not self._decoding:
                logger.warning(
                    "The masks of %s models cannot be differentiated, so errors are not weighed by them.",
                    self.sites.family.name,
                )
        return self._decoding

    def _tune_on_masks(self) -> None:
        """Tunes the finished decoder on the float model's masks, where the method asks for it."""
        settings = self.method.reconstruction_for(self.units[-1]) if self.units else None
        if settings is None or settings.mask_steps == 0 or (settings.mask_optional and not self._decodes()):
            return
        steps = settings.mask_steps
        self.report.masks = tune_on_masks(
            self.model,
            self.sites.decoder,
            self.sites.family,
            *self.encoded,
            self.reference,
            self.data.images,
            steps=steps,
            rate=settings.mask_rate,
            norms=settings.mask_norms,
            seed=unit_seed(self.context.seed, MASKS),
            device=self.device,
            progress=self._tuning_progress(MASKS, steps),
        )

    def _tune(self) -> None:
        """Tunes the finished model as a whole, where the method asks for it."""
        settings = self.method.tuning_settings
        if settings is None or settings.steps == 0 or self.encoded is None or not self._decodes():
            return
        encoder = self.parts[0]
        self.report.tuning = tune(
            self.model,
            self.reference,
            self.sites.family,
            encoder if encoder.stages else None,
            *self.encoded,
            self.data.images,
            (*(stage.name for stage in encoder.stages), self.sites.decoder),
            settings,
            seed=unit_seed(self.context.seed, WHOLE),
            device=self.device,
            progress=self._tuning_progress(WHOLE, settings.steps),
        )

    def _tuning_progress(self, name: str, steps: int) -> Callable[[int], None]:
        number = next(i for i, each in enumerate(self.planned) if each.name == name)
        self.progress(number, len(self.planned), name, 0, steps)
        return lambda step: self.progress(number, len(self.planned), name, step, steps)

    def _observe(self, unit: Unit, data: UnitData) -> None:
        """Ranges of a unit, from the quantized-so-far inputs, activations inside in floating point."""
        recorder = RangeRecorder(unit.modules(self.model))
        with recorder.recording(), simulate(weights=True, activations=False):
            for index in range(len(data.quantized)):
                run_unit(self.model, unit, data.quantized.get(index, self.device))
        recorder.apply(self.method.activation_observer)


@dataclass
class _Stream:
    """One model, and its activations where the walk is: the inputs of the stage that comes next."""

    model: nn.Module
    inputs: ActivationCache


def quantized_layers(modules: list[nn.Module]) -> list[QuantizedLayer]:
    """All quantized layers within some modules."""
    return [part for module in modules for part in module.modules() if isinstance(part, QuantizedLayer)]


def fit_weights(module: nn.Module, observer: str) -> None:
    """(Re)fits the weight grids within a module that are not integers yet."""
    for layer in quantized_layers([module]):
        if layer.codes is None:
            layer.fit_weight(observer)
