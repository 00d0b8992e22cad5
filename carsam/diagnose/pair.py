"""The models that a diagnosis compares: float, packed, and rounded to nearest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from carsam.bits.plan import BitPlan, Bits
from carsam.calibrate.ranges import calibrate
from carsam.data.images.normalisation import named_normalisation, normalisation_of, set_normalisation
from carsam.errors import CheckpointError
from carsam.methods.base import Method, create
from carsam.models.family import family_of, find_sites
from carsam.models.load import load_model
from carsam.models.prepare import prepare_model
from carsam.models.sites import Sites
from carsam.pack.checkpoint import RECIPE, load
from carsam.pack.layers import PackedLayer
from carsam.pack.source import packed_folder
from carsam.prompts.calibration import CalibrationSet
from carsam.quantizers import ActivationQuantizer, UniformSoftmax
from carsam.reading import read_yaml
from carsam.run.quantization import chosen_ranges, chosen_softmax
from carsam.run.walk import fit_weights, quantized_layers
from carsam.transform.choice import Choices

_FIX = "get the folder again"


@dataclass(frozen=True)
class Pair:
    """A float model and the packed model that was made from it, on one device.

    Attributes:
        source: The float model as loaded.
        reference: The same in :func:`float_form`.
        packed: The packed model.
        sites: The sites of both models.
        method: That packed it.
        decoder_only: The packed model's image encoder is in floating point.
    """

    source: PreTrainedModel
    reference: PreTrainedModel
    packed: PreTrainedModel
    sites: Sites
    method: Method
    decoder_only: bool = False

    @property
    def models(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Float, packed."""
        return self.reference, self.packed

    @property
    def device(self) -> torch.device:
        """The device of both models."""
        return self.reference.device


def open_pair(
    float_model: str | Path, quantized: str | Path, device: str | torch.device, normalise: str | None = None
) -> Pair:
    """Loads both models and checks that they belong together.

    Args:
        float_model: As for ``carsam quantize``.
        quantized: Packed folder, or Hub id of one.
        device: ``cpu``, ``cuda`` or ``auto``.
        normalise: ``imagenet``, ``unit`` or ``min-max`` for both; the packed model's own without it.

    Raises:
        CarsamError: A model is missing, damaged or of the wrong kind; they are not float and quantized form of one
            model; the device is not there.
    """
    folder = packed_folder(quantized)
    if folder is None:
        raise CheckpointError(
            f"{quantized} is not a packed carsam model; give the folder that carsam quantize wrote, or its Hub id."
        )
    packed = load(folder, device=device)
    normalisation = normalisation_of(packed) if normalise is None else named_normalisation(normalise)
    recipe = read_yaml(folder / RECIPE, _FIX, error=CheckpointError)
    name, settings = (recipe.get(key) for key in ("method", "settings")) if isinstance(recipe, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(settings, dict):
        raise CheckpointError(f"{folder / RECIPE} is damaged: it names no method and its settings; {_FIX}.")
    method = create(name, settings)
    size = recipe.get("image_size")
    source = load_model(float_model, device=device, image_size=size if isinstance(size, int) else None)
    for model in (source, packed):  # the same pixels for both, or their difference would be the pixels'
        set_normalisation(model, normalisation)
    check_pair(source, packed, str(float_model), str(quantized))
    sites = find_sites(source).on_images()  # a memory is not looked at: no image reaches it
    return Pair(source, float_form(source, sites), packed, sites, method, recipe.get("decoder_only") is True)


def check_pair(reference: PreTrainedModel, packed: PreTrainedModel, float_name: str, packed_name: str) -> None:
    """Refuses models of different architecture, and a packed model that was made from another float model.

    Raises:
        CheckpointError: They differ.
    """
    shapes, packed_shapes = (_architecture(model) for model in (reference, packed))
    different = sorted(
        name for name in shapes.keys() | packed_shapes.keys() if shapes.get(name) != packed_shapes.get(name)
    )
    if different:
        name = different[0]
        raise CheckpointError(
            f"{float_name} and {packed_name} are of different architecture ({name}: {shapes.get(name)} and "
            f"{packed_shapes.get(name)}); give the float model that was quantized."
        )
    states = reference.state_dict(), packed.state_dict()
    for name in family_of(reference).untouched:
        ours, theirs = (state[name].float().cpu() for state in states)
        if (ours - theirs).norm() > 0.01 * ours.norm():
            raise CheckpointError(
                f"{packed_name} was not made from {float_name}: {name}, which quantization leaves as it is, differs; "
                "give the float model that was quantized."
            )


def _architecture(model: PreTrainedModel) -> dict[str, Any]:
    found = family_of(model).architecture(model)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}
    for name, value in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if ".input_quantizer." in name or ".matmul." in name or leaf in ("weight_scale", "weight_zero_point"):
            continue
        shape = packed[owner].shape if owner in packed and leaf == "weight" else value.shape
        found[name] = list(shape)
    return found


def float_form(model: PreTrainedModel, sites: Sites) -> PreTrainedModel:
    """A float model with the quantizers' places (at 16 bits they do nothing): the packed model's hooks then fit it.

    Its parameters are the given model's own; nothing is copied.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    form = copy.deepcopy(model, shared)
    prepare_model(
        form,
        sites,
        BitPlan(Bits(16, 16)),
        quantizer_for=lambda _site, bits, _role: ActivationQuantizer(bits),
        softmax_for=lambda _site, bits: UniformSoftmax(bits),
    )
    return form.eval().requires_grad_(False)


def layout_plan(packed: PreTrainedModel, sites: Sites) -> BitPlan:
    """The bits of a packed model, site by site, from its own layout."""
    layout = packed.config.quantization_config.layout
    overrides = []
    for site in sites.layers:
        spec = layout["layers"].get(site.name)
        overrides.append((site.name, Bits(spec["weight"], spec["input"]["bits"]) if spec else Bits(16, 16)))
    known = {site.name for site in sites.attentions}
    for name, operands in layout["attentions"].items():
        if name not in known:
            continue
        overrides += [(f"{name}.{which}", Bits(16, spec["bits"])) for which, spec in operands.items()]
    return BitPlan(Bits(16, 16), tuple(overrides))


def round_to_nearest(
    pair: Pair, data: CalibrationSet, progress: Callable[[int, int], None] | None = None
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """What every method starts from: nearest rounding at the packed model's bits, with its grids and observers.

    Args:
        pair: The models.
        data: Calibration images: ranges are observed on them.
        progress: Called as ``progress(images_done, n_images)``.

    Returns:
        The float model that the rounded one is made from (the reference, or its equivalent after what the method
        changes in floating point), and the rounded one: its activations are quantized under
        ``simulate(activations=True)``.
    """
    method, sites = pair.method, pair.sites
    rounded, base, plan, choices = (
        copy.deepcopy(pair.source),
        pair.reference,
        layout_plan(pair.packed, sites),
        Choices(),
    )
    if type(method).transform is not Method.transform or type(method).choose is not Method.choose:
        treated = sites.of_decoder() if pair.decoder_only else sites
        method.transform(rounded, treated, data)
        choices = method.choose(rounded, treated, data, plan)
        base = float_form(copy.deepcopy(rounded), sites)
    quantizers = chosen_ranges(choices.ranges, method), chosen_softmax(choices.softmax, method)
    prepare_model(rounded, sites, plan, *quantizers)
    rounded.to(pair.device).eval().requires_grad_(False)
    fit_weights(rounded, method.weight_observer)
    calibrate(rounded, data, method.activation_observer, progress=progress)
    for layer in quantized_layers([rounded]):
        layer.freeze()
    return base, rounded
