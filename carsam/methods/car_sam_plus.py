"""CAR-SAM+: CAR-SAM's bits and granularity, with what costs nothing at run time (docs/BEYOND.md)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from carsam.bits.plan import BitPlan
from carsam.calibrate.counted import Count
from carsam.calibrate.sensitivity import SensitivitySettings, mask_sensitivity, unweighed
from carsam.compensate.mac import OFF, MacReport, MacSettings
from carsam.compensate.passes import FloatRows, QuantizedPasses
from carsam.compensate.refit import RefitReport, RefitSettings, refit_layers
from carsam.compensate.spread import restore_layers
from carsam.errors import ConfigError
from carsam.methods.car_sam import CarSam
from carsam.models.family import ENCODED
from carsam.models.prepare import MakeSoftmax
from carsam.models.sites import DEPTHWISE, ResidualStream, Sites
from carsam.prompts.calibration import CalibrationSet
from carsam.quantizers import ChannelQuantizer, SiteQuantizer, SoftmaxQuantizer, UniformSoftmax, softmax_grids
from carsam.quantizers.ranges import OBSERVERS, Range
from carsam.quantizers.shifted import Shift, ShiftedQuantizer
from carsam.reconstruct.optimize import ReconstructionSettings, UnitData
from carsam.reconstruct.tuning import TuningSettings
from carsam.reconstruct.units import Unit, run_unit
from carsam.transform.calls import captured_calls, weigh_calls
from carsam.transform.choice import FOLDINGS, MAPS, Choices, choose_foldings
from carsam.transform.learned_maps import learn_maps
from carsam.transform.norm_choice import choose_norms
from carsam.transform.operands import Refused
from carsam.transform.range_choice import choose_ranges
from carsam.transform.rotation import keeping_ones, randomised_hadamard, rotate_residual
from carsam.transform.statistics import operand_statistics

logger = logging.getLogger(__name__)

# Steps of a depthwise convolution's input: one for each channel, or one for all.
PER_CHANNEL, PER_TENSOR = "channel", "tensor"


@dataclass(frozen=True)
class EquivalenceSettings:
    """What may be folded into the float model's weights; the model computes the same afterwards.

    Attributes:
        foldings: Tried at every attention, in this order; each is kept where it lowers the error of the attention's
            output on held-out calibration images.
        softmax: Grids of softmax outputs to choose among for every attention; the first is the one to beat.
        smoothing: Strengths to try for the channels of a norm that one Linear alone reads; none tries nothing.
        shift: Try to move those channels to the middle of their range as well.
        observers: Range searches to try beside the usual one: for Q, K and V by the error of the attention's output,
            for a layer's input by that of the layer's.
        shifts: Try a grid with a shift for every channel at the inputs of layers: with one step for all it begins
            elsewhere in each (:mod:`carsam.quantizers.shifted`).
        rotation: Rotate the residual stream of the image encoder.
        images: Calibration images that choices are made on; every third of them judges.
        map_steps: Steps in which maps of heads are learned at every attention, with the ranges of Q, K, V and of the
            output projection's input; 0 leaves both as they were chosen.
        map_images: Calibration images that they are learned on; every third judges.
        strict: Refuse the whole run where a family's table forbids an equivalence. Otherwise it is left out there, with
            the reason in a warning and in the reports.
    """

    foldings: tuple[str, ...] = ("centre values", "centre keys", "balance")
    softmax: tuple[str, ...] = ("uniform", "row-max", "log2")
    smoothing: tuple[float, ...] = (0.35, 0.5, 0.65, 0.8)
    shift: bool = True
    observers: tuple[str, ...] = ("percentile", "min-max")
    shifts: bool = True
    rotation: bool = False
    images: int = 9
    map_steps: int = 400
    map_images: int = 18
    strict: bool = False

    def __post_init__(self):
        for name, values, known in (
            ("folding", self.foldings, FOLDINGS),
            ("softmax", self.softmax, softmax_grids()),
            ("observer", self.observers, OBSERVERS),
        ):
            for value in values:
                if value not in known:
                    raise ConfigError(f"unknown {name} {value!r}; choose from {', '.join(known)}.")
        if not self.softmax:
            raise ConfigError("at least one grid of softmax outputs must be left to choose from.")
        if not all(0 <= strength <= 1 for strength in self.smoothing):
            raise ConfigError(f"strengths of the smoothing must lie in 0 to 1, not {list(self.smoothing)}.")
        if min(self.images, self.map_images) < 1 or self.map_steps < 0:
            raise ConfigError("equivalences need at least one image, and map_steps must not be negative.")


def _reconstruction() -> ReconstructionSettings:
    # Errors weighed by the masks: chosen on calibration images held out (docs/RESULTS.md, 19).
    masks = {"mask_weight": 1.0, "mask_optional": True}
    return ReconstructionSettings(steps=300, decoder_steps=300, drop_probs=False, scale_rate=1e-2, **masks)


def _masks() -> SensitivitySettings:
    # Weighing helps where nothing is learned afterwards (preset fast), and not where the masks' loss is learned from
    # (docs/RESULTS.md, 19).
    return SensitivitySettings(share=0.0)


@dataclass(frozen=True)
class CarSamPlus(CarSam):
    """CAR-SAM with equivalences, grids of P chosen by the attention's output, and the refit of every layer.

    Attributes:
        equivalences: What may be folded into weights.
        refit: Of every layer to its quantized input, and rounding with feedback where nothing is learned.
        masks: Errors weighed by what the masks make of them, in choices and refit; off unless its share is set.
        tuning: Of the finished model as a whole; off unless it is given steps.
        learn: Learn rounding and steps; False rounds with feedback instead, and so does
            ``reconstruction.learn_rounding: false``, which learns the steps of activations afterwards.
        reconstruction: Settings of the optimiser loop.
        depthwise: Steps of the inputs of depthwise convolutions: ``channel`` gives each channel its own, which costs
            the integer arithmetic nothing there; ``tensor`` one to all.
        softmax: Another grid than ``uniform`` is taken for every attention; else ``equivalences.softmax`` are there to
            choose from.
        mac: Settings of MAC; off, since the refit answers the same errors and those from upstream as well.
    """

    name: ClassVar[str] = "car-sam-plus"
    chooses: ClassVar[bool] = True
    summary: ClassVar[str] = "CAR-SAM with equivalences, chosen grids of P and the refit of layers"

    reconstruction: ReconstructionSettings = field(default_factory=_reconstruction)
    mac: MacSettings = OFF
    equivalences: EquivalenceSettings = field(default_factory=EquivalenceSettings)
    refit: RefitSettings = field(default_factory=RefitSettings)
    masks: SensitivitySettings = field(default_factory=_masks)
    tuning: TuningSettings = field(default_factory=TuningSettings)
    learn: bool = True
    depthwise: str = PER_CHANNEL

    def __post_init__(self):
        super().__post_init__()
        if self.depthwise not in (PER_CHANNEL, PER_TENSOR):
            raise ConfigError(f"unknown depthwise {self.depthwise!r}; choose from {PER_CHANNEL}, {PER_TENSOR}.")

    @property
    def grids(self) -> tuple[str, ...]:
        """Grids of P to choose from."""
        return self.equivalences.softmax if self.softmax == UniformSoftmax.grid else (self.softmax,)

    @property
    def notes(self) -> str:
        """Grids of P that may be chosen and are not uniform."""
        noted = [note for name in self.grids if (note := softmax_grids()[name].note)]
        notes = []
        if noted:
            every = len(noted) == len(self.grids)
            notes.append(f"P in {' or '.join(noted if every else ('uniform codes', *noted))}")
        if self.depthwise == PER_CHANNEL:
            notes.append("inputs of depthwise convolutions, if any, per channel")
        if self.equivalences.shifts:
            notes.append(f"inputs of layers {ShiftedQuantizer.note}")
        return "; ".join(notes)

    def quantizer_for(self, site: str, bits: int, role: str) -> SiteQuantizer:
        if self._per_channel(role):
            return ChannelQuantizer(bits, maps=1)
        return super().quantizer_for(site, bits, role)

    def _per_channel(self, role: str) -> bool:
        return role == DEPTHWISE and self.depthwise == PER_CHANNEL

    def transform(self, model: nn.Module, sites: Sites, data: CalibrationSet) -> list[dict[str, Any]]:
        """The rotation of the encoder's stream: it needs neither ranges nor bits."""
        if not self.equivalences.rotation:
            return []
        try:
            width = _stream_width(model, sites)
            turned = randomised_hadamard(width - 1, torch.Generator().manual_seed(0))
            rotate_residual(model, sites, keeping_ones(turned))
        except Refused as refusal:
            if self.equivalences.strict:
                raise
            logger.warning("%s It is left out.", refusal)
            return [{"transform": "rotation", "refused": str(refusal)}]
        return [{"transform": "rotation", "channels": width}]

    def choose(
        self,
        model: nn.Module,
        sites: Sites,
        data: CalibrationSet,
        plan: BitPlan,
        advance: Callable[[int, int], None] = lambda *_: None,
    ) -> Choices:
        """Norms, then attentions: each keeps what lowers its error on images that its ranges were not set on."""
        settings, reports = self.equivalences, []
        counted = Count(self._parts(sites, len(data.images)), advance)
        if settings.smoothing or settings.shift:
            reports += choose_norms(
                model,
                sites,
                data,
                plan,
                strengths=settings.smoothing,
                shift=settings.shift,
                observer=self.activation_observer,
                weight_observer=self.weight_observer,
                images=settings.images,
                strict=settings.strict,
                counted=counted,
            )
        # One pass over the images for all that is asked of attentions.
        pairs = any(name in settings.foldings for name in MAPS)
        statistics, hooks = operand_statistics(model, sites.attentions, pairs=pairs)
        count = max(settings.images, settings.map_images if settings.map_steps else 0)
        calls, encoded = captured_calls(model, sites, data, count, hooks, counted)
        data = data.with_first_embeddings([each[ENCODED] for each in encoded])
        sensitivity, weights = None, unweighed
        if self.masks.share > 0:
            sensitivity = mask_sensitivity(model, sites, data, self.masks, counted=counted)
            if sensitivity is None:
                why = f"The masks of {sites.family.name} models cannot be differentiated to weigh errors by them."
                reports.append({"transform": "mask sensitivity", "refused": why})
            else:
                weights = sensitivity.weights
                weigh_calls(calls, sites, weights)
        choices = choose_foldings(
            model,
            sites,
            plan,
            {name: each.first(min(settings.images, len(data.images))) for name, each in calls.items()},
            statistics,
            foldings=settings.foldings,
            grids=self.grids,
            softmax=lambda grid, _site, bits: self.softmax_of(grid, bits),
            observer=self.activation_observer,
            observers=settings.observers,
            strict=settings.strict,
            counted=counted,
        )
        reports += choices.reports
        ranges: dict[str, str | Range | Shift] = dict(choices.ranges)
        if settings.map_steps:
            learned, noted = learn_maps(
                model,
                sites,
                plan,
                calls,
                softmax=lambda grid, _site, bits: self.softmax_of(grid, bits),
                grids=choices.softmax,
                observer=self.activation_observer,
                ranges=ranges,
                steps=settings.map_steps,
                counted=counted,
            )
            ranges |= learned
            reports += noted
        if settings.observers or settings.shifts:
            usual = self.activation_observer
            observers = (usual, *(each for each in settings.observers if each != usual))
            # A channel of its own needs no choice: its range serves one filter.
            alone = {site.name for site in sites.layers if self._per_channel(site.role)}
            found, noted = choose_ranges(
                model,
                sites,
                data,
                plan,
                observers=observers,
                shifts=settings.shifts,
                known=ranges,
                leave=alone,
                images=settings.images,
                weights=weights,
                counted=counted,
            )
            ranges |= found
            reports += noted
        for report in reports:
            if "refused" in report:
                logger.warning("%s It is left out.", report["refused"])
        return Choices(choices.softmax, ranges, reports, sensitivity)

    def _parts(self, sites: Sites, images: int) -> int:
        """Parts of :meth:`choose` that are counted: images, norms and attentions that it goes through."""
        settings = self.equivalences
        parts = images if self.masks.share > 0 else 0
        parts += len(sites.readers) if settings.smoothing or settings.shift else 0
        parts += min(images, max(settings.images, settings.map_images if settings.map_steps else 0))
        parts += len(sites.attentions) * (2 if settings.map_steps else 1)
        return parts + (min(images, settings.images) if settings.observers or settings.shifts else 0)

    def softmax_for(self, site: str, bits: int) -> SoftmaxQuantizer:
        return self.softmax_of(self.grids[0], bits)

    def softmax_choices(self) -> Sequence[MakeSoftmax]:
        def of(grid: str) -> MakeSoftmax:
            return lambda _site, bits: self.softmax_of(grid, bits)

        return [of(grid) for grid in self.grids]

    def reconstruction_for(self, unit: Unit) -> ReconstructionSettings | None:
        return self.reconstruction if self.learn else None

    @property
    def tuning_settings(self) -> TuningSettings | None:
        return self.tuning

    def float_rows(self, reference: nn.Module, unit: Unit, sites: Sites) -> FloatRows | None:
        """What the refit is fitted to."""
        if not self.refit.enabled:
            return None
        layers = [site.name for site in sites.layers if unit.holds(site.name)]
        return FloatRows(reference, layers, self.refit.items)

    def prepare_unit(
        self, model: nn.Module, unit: Unit, data: UnitData, sites: Sites, device: torch.device
    ) -> list[MacReport | RefitReport]:
        """MAC where it is on, then the refit of every layer in the order of execution."""
        reports: list[MacReport | RefitReport] = list(super().prepare_unit(model, unit, data, sites, device))
        if not self.refit.enabled:
            return reports

        # Layers in the order in which the float model came by them.
        passes = self._passes(model, unit, data, list(data.rows.rows), device)
        if not self.learn:
            data.around = passes.left_out
        feedback = self.refit.feedback and not (self.learn and self.reconstruction.learn_rounding)
        refitted, data.spreads = refit_layers(
            model,
            passes,
            data.rows.rows,
            self.refit,
            feedback=feedback,
            together=_projections(sites),
            weight_observer=self.weight_observer,
            weights=unweighed if data.sensitivity is None else data.sensitivity.weights,
        )
        return reports + refitted

    def _passes(
        self, model: nn.Module, unit: Unit, data: UnitData, layers: list[str], device: torch.device
    ) -> QuantizedPasses:
        # Not the unit's data: what it leaves out of passes knows them, and a ring is freed late or never.
        inputs = data.quantized
        runs = [
            lambda index=index: run_unit(model, unit, inputs.get(index, device))
            for index in range(min(len(inputs), self.refit.items))
        ]
        return QuantizedPasses(model, layers, runs)

    def finish_unit(self, model: nn.Module, unit: Unit, data: UnitData, sites: Sites, device: torch.device) -> None:
        """What learning took of the spread of outputs is given back."""
        if not (self.learn and self.refit.enabled and self.refit.weights and self.refit.spread):
            return
        restore_layers(
            model,
            self._passes(model, unit, data, list(data.spreads), device),
            data.spreads,
            self.refit.spread,
            together=_projections(sites),
        )

    def unit_settings(self, unit: Unit, sites: Sites) -> dict[str, Any]:
        settings = super().unit_settings(unit, sites) if self.learn else self._unlearned(unit, sites)
        # Equivalences and grids are part of the model that the units are made from.
        if self.refit.enabled:
            settings["refit"] = asdict(self.refit)
            settings["masks"] = asdict(self.masks)
        return settings

    def _unlearned(self, unit: Unit, sites: Sites) -> dict[str, Any]:
        settings = super().unit_settings(unit, sites)
        settings["reconstruction"] = None
        return settings


def _projections(sites: Sites) -> list[tuple[str, ...]]:
    """Projections of every attention, none of which reads what another gives."""
    return [(site.query.layer, site.key.layer, site.value.layer) for site in sites.attentions]


def _stream_width(model: nn.Module, sites: Sites) -> int:
    """Channels of the image encoder's stream.

    Raises:
        Refused: The family has none that may be turned.
    """
    if not isinstance(sites.residual, ResidualStream):
        rotate_residual(model, sites, torch.eye(1))  # says why
    return model.get_submodule(sites.residual.readers[0]).weight.shape[1]


# What --preset sets; the method's own settings are those of "balanced".
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"learn": False, "masks": {"share": 0.9}},
    "balanced": {},
    "best": {"tuning": {"steps": 300}},
}
