"""The part of a quantization that computes: settings, the float model, and the way to a model of integers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from carsam.bits.allocation import Budget
from carsam.bits.plan import BitPlan
from carsam.calibrate.ranges import calibrate
from carsam.config import QuantizeConfig
from carsam.data.images.normalisation import Normalisation, normalisation_of, set_normalisation
from carsam.errors import CheckpointError
from carsam.methods.base import Method
from carsam.models.forward import encode_image
from carsam.models.load import load_model
from carsam.models.prepare import MakeQuantizer, MakeSoftmax, prepare_model
from carsam.models.sites import Sites
from carsam.output.checks import base_ingredients
from carsam.pack.layers import PackedLayer
from carsam.prompts.calibration import CalibrationSet
from carsam.quantizers import QuantizedLayer, SiteQuantizer, SoftmaxQuantizer, softmax_grids
from carsam.quantizers.ranges import Range
from carsam.quantizers.shifted import Shift, ShiftedQuantizer
from carsam.run.allocation import plan_for_budget
from carsam.run.context import RunContext
from carsam.run.memory import release_memory
from carsam.run.store import fingerprint
from carsam.run.walk import Walk, WalkReport, fit_weights, quantized_layers


@dataclass(frozen=True)
class QuantizeResult:
    """What a quantization gives.

    Attributes:
        model: The packed model, in eval mode.
        recipe: The full configuration, as saved in ``recipe.yaml``.
        report: Units and compensations.
        seconds: Wall-clock time of the whole call.
        peak_memory: Of the process, in bytes (of the GPU where one was used).
        skipped_images: Calibration images that could not be read.
        stages: Wall-clock time by stage, in order (:data:`carsam.run.progress.STAGES`).
    """

    model: PreTrainedModel
    recipe: dict[str, Any]
    report: WalkReport
    seconds: float
    peak_memory: int
    skipped_images: int
    stages: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Measurements as plain mappings (``results.json`` under ``quantization``)."""
        return {
            "seconds": round(self.seconds, 1),
            "stages": {name: round(seconds, 2) for name, seconds in self.stages.items()},
            "peak_memory_bytes": self.peak_memory,
            "skipped_images": self.skipped_images,
            "units": [asdict(unit) for unit in self.report.units],
            "compensations": [asdict(item) for item in self.report.compensations],
            "transforms": self.report.transforms,
            **({"masks": asdict(self.report.masks)} if self.report.masks is not None else {}),
            **({"tuning": asdict(self.report.tuning)} if self.report.tuning is not None else {}),
        }


@dataclass
class Run:
    """Settings of a run, parsed."""

    config: QuantizeConfig
    method: Method
    plan: BitPlan
    device: torch.device

    def treated(self, sites: Sites) -> Sites:
        """The sites that the method sees: all, or those of the decoder."""
        return sites.of_decoder() if self.config.decoder_only else sites


def reference_model(
    model: PreTrainedModel | str | Path,
    device: torch.device,
    normalisation: Normalisation | None,
    image_size: int | None,
) -> PreTrainedModel:
    """The float model to quantize, on its device; a copy where the caller gave a model.

    Args:
        model: A float model, or what :func:`carsam.load_model` takes.
        device: Where it goes.
        normalisation: Of its pixels; None for its own.
        image_size: Side of the input in pixels, for a checkpoint that does not show it.

    Raises:
        CheckpointError: There is no such model, or it is packed already.
    """
    if isinstance(model, PreTrainedModel) and any(isinstance(module, PackedLayer) for module in model.modules()):
        raise CheckpointError("this model is packed already; quantize the float model that it was made from.")
    reference = copy.deepcopy(model) if isinstance(model, PreTrainedModel) else load_model(model, image_size=image_size)
    # Written into its configuration: a folder that it names may be another one by the time of packing.
    set_normalisation(reference, normalisation or normalisation_of(reference))
    return reference.requires_grad_(False).eval().float().to(device)


def chosen_softmax(chosen: Mapping[str, str], method: Method) -> MakeSoftmax:
    """Makes the quantizer of a softmax output: of the grid chosen for its attention, else the method's."""
    grids = softmax_grids()

    def softmax(site: str, bits: int) -> SoftmaxQuantizer:
        grid = chosen.get(site.removesuffix(".probs"))
        return grids[grid](bits) if grid is not None else method.softmax_for(site, bits)

    return softmax


def chosen_ranges(chosen: Mapping[str, str | Range | Shift], method: Method) -> MakeQuantizer:
    """Makes the quantizer of an activation site: shifted where that was chosen, else the method's, with the observer
    that was chosen for it."""

    def quantizer(site: str, bits: int, role: str) -> SiteQuantizer:
        found = chosen.get(site)
        if isinstance(found, Shift):
            return ShiftedQuantizer(bits, maps=found.maps)
        made = method.quantizer_for(site, bits, role)
        made.observer = found
        return made

    return quantizer


def to_integers(
    reference: PreTrainedModel, sites: Sites, run: Run, data: CalibrationSet, context: RunContext
) -> tuple[PreTrainedModel, WalkReport]:
    """From the float model to one whose weights are all integers: transform, weight grids, then units or ranges.

    Args:
        reference: The float model; a method's transform changes it, to one that computes the same.
        sites: Its sites.
        run: Settings.
        data: Calibration images.
        context: What the run carries.

    Returns:
        The quantized model, not packed yet, and what happened on the way.
    """
    method, plan, stages, hooks = run.method, run.plan, context.stages, context.hooks
    data = sites.family.calibration_data(reference, data)
    treated = run.treated(sites)
    budget, choosing = run.config.budget, "choices" if method.chooses else "weight grids"
    with stages("bits" if budget is not None else choosing), hooks.work("transform"):
        transforms = method.transform(reference, treated, data)
        if budget is not None:
            # Before the choices: what is folded, learned and chosen is so for the bits that a site has.
            plan, allocation = plan_for_budget(
                Budget.parse(budget), reference, sites, plan, method, data, stages.advance
            )
            transforms.append(allocation)
            run.plan = plan
    with stages(choosing), hooks.work("transform"):
        choices = method.choose(reference, treated, data, plan, stages.advance)
    release_memory()
    with stages("weight grids"):
        softmax = chosen_softmax(choices.softmax, method)
        model = copy.deepcopy(reference)
        prepare_model(model, sites, plan, chosen_ranges(choices.ranges, method), softmax)
        model.to(context.device).requires_grad_(False)
        with hooks.work("fit weights"):
            fit_weights(model, method.weight_observer)

    report = WalkReport()
    units = method.units(treated)
    if units:
        bits = [plan.weight_bits(site.name) for site in sites.layers]
        bits += [plan.activation_bits(name) for name in sites.activation_names]
        decided = [bits, *(each for each in (choices.softmax, choices.ranges) if each)]
        base_key = fingerprint(base_ingredients(reference, data, context.seed, context.device), *decided)
        with stages("units", len(units)):
            report = Walk(model, reference, treated, method, data, base_key, context, choices.sensitivity).run()
    else:
        total = len(data.images)

        def advance(done: int, _: int) -> None:
            stages.advance(done, total)
            if context.progress is not None:
                context.progress(0, 1, "calibration", done, total)

        # The float encoder's embeddings may be kept from an earlier run.
        encode = functools.partial(encode_image, reference) if run.config.decoder_only else None
        with stages("ranges", total), hooks.work("ranges"):
            calibrate(model, data, method.activation_observer, encode=encode, progress=advance)
            for layer in quantized_layers([model]):
                layer.freeze()
    report.transforms = transforms + choices.reports
    assert all(m.codes is not None or m.weight_bits >= 16 for m in model.modules() if isinstance(m, QuantizedLayer))
    return model, report
