"""The layout of a packed model: which sites are quantized, with which grids and bits.

It is what ``quantization_config`` in ``config.json`` holds, and all that is needed to build the packed form of a float
model before its tensors are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from carsam.bits.plan import SUPPORTED_BITS
from carsam.errors import CheckpointError
from carsam.models.attention import MatMulQuantizers
from carsam.models.family import find_sites
from carsam.models.prepare import attach_attention
from carsam.models.sites import OPERANDS, Sites, replace_module
from carsam.pack.layers import PackedLayer
from carsam.quantizers import QuantizedLayer, SiteQuantizer, activation_grids, softmax_grids
from carsam.quantizers.grid import Grid

# More than any model has: ViT-H has 179 layers.
MOST_SITES = 20_000


def describe(model: PreTrainedModel, sites: Sites) -> dict[str, Any]:
    """The layout of a model whose layers are quantized or packed.

    Returns:
        ``{"layers": {path: {"weight": bits, "input": grid}}, "attentions": {path: {operand: grid}}}`` where a grid is
        ``{"grid": name, "bits": bits}``, with what else builds its quantizer again.
    """
    layers = {}
    for site in sites.layers:
        layer = model.get_submodule(site.name)
        if isinstance(layer, (QuantizedLayer, PackedLayer)):
            layers[site.name] = {"weight": layer.weight_bits, "input": layer.input_quantizer.spec()}
    attentions = {}
    for site in sites.attentions:
        matmul = model.get_submodule(site.name).matmul
        attentions[site.name] = {which: getattr(matmul, which).spec() for which in OPERANDS}
    return {"layers": layers, "attentions": attentions}


def check_layout(layout: Any) -> dict[str, Any]:
    """Refuses what :func:`describe` cannot have written.

    Raises:
        CheckpointError: A mapping, name, grid or number of bits is not what it must be.
    """
    parts = [layout.get(part) if isinstance(layout, Mapping) else None for part in ("layers", "attentions")]
    if not all(isinstance(part, Mapping) for part in parts):
        raise _wrong("layout", "it must hold the mappings layers and attentions")
    layers, attentions = parts
    if len(layers) + len(attentions) > MOST_SITES:
        raise _wrong("layout", "it names more sites than any model has")
    of_activations, of_softmax = activation_grids(), softmax_grids()
    for name, spec in layers.items():
        if not isinstance(spec, Mapping) or set(spec) != {"weight", "input"}:
            raise _wrong(name, "a layer has weight and input")
        _check_bits(name, spec["weight"])
        _check_grid(f"{name}.input", spec["input"], of_activations)
    for name, operands in attentions.items():
        if not isinstance(operands, Mapping) or set(operands) != set(OPERANDS):
            raise _wrong(name, f"an attention has {', '.join(OPERANDS)}")
        for which, spec in operands.items():
            _check_grid(f"{name}.{which}", spec, of_softmax if which == "probs" else of_activations)
    return layout


def _check_grid(name: str, spec: Any, grids: Mapping[str, type[Grid]]) -> None:
    if not isinstance(spec, Mapping) or not isinstance(spec.get("grid"), str):
        raise _wrong(name, "a grid has a name and bits")
    grid = spec["grid"]
    if grid not in grids:
        raise CheckpointError(
            f"the packed model uses the grid {grid[:60]!r}, which this version of carsam does not know "
            f"(it knows {', '.join(grids)}); install a newer carsam, or the package that brings this grid."
        )
    _check_bits(name, spec.get("bits"))
    allowed = grids[grid].arguments
    missing = [key for key in allowed if key not in spec] if spec["bits"] < 16 else []
    if missing:
        # Log2 codes once had no zero, and said nothing of it: read as today's, their last code would be another value.
        raise CheckpointError(
            f"config.json does not say {', '.join(missing)} of the grid {grid} at {str(name)[:120]}: the folder was "
            "packed by an earlier carsam, whose grid of this name was another one. Quantize the model again."
        )
    for key, value in spec.items():
        if key in ("grid", "bits"):
            continue
        if key not in allowed or type(value) is not int or not 0 <= value <= allowed[key]:
            raise _wrong(name, f"the grid {grid} has no {str(key)[:60]} of {str(value)[:60]}")


def _check_channels(name: str, spec: Mapping[str, Any], layer: nn.Module) -> None:
    """Refuses a grid with other channels than its layer reads, or with channels in another dimension."""
    channels, maps = layer.weight.shape[1] * getattr(layer, "groups", 1), int(layer.weight.dim() > 2)
    if spec.get("channels", channels) != channels:
        raise _wrong(name, f"the layer reads {channels} channels, not {spec['channels']}")
    if spec.get("maps", maps) != maps:
        raise _wrong(name, f"maps is {maps} at a layer of this kind, not {spec['maps']}")


def _check_bits(name: str, bits: Any) -> None:
    if type(bits) is not int or bits not in SUPPORTED_BITS:
        raise _wrong(name, f"bits are one of {', '.join(map(str, SUPPORTED_BITS))}, not {str(bits)[:60]}")


def _wrong(name: str, why: str) -> CheckpointError:
    return CheckpointError(f"config.json describes {str(name)[:120]} wrongly: {why}; get the packed folder again.")


def _build(spec: dict[str, Any], grids: Mapping[str, type[Grid]]) -> nn.Module:
    arguments = {name: value for name, value in spec.items() if name != "grid"}
    try:
        return grids[spec["grid"]](**arguments, always=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"config.json describes the grid {spec} wrongly: {error}; get it again.") from None


def build_packed(model: PreTrainedModel, layout: dict[str, Any]) -> None:
    """Turns a float model, in place, into the (empty) packed form that a layout describes (see :func:`check_layout`).

    Raises:
        CheckpointError: The layout does not fit the model.
    """
    sites = find_sites(model)
    layers = {site.name for site in sites.layers}
    attentions = {site.name: site for site in sites.attentions}
    unknown = (set(layout["layers"]) - layers) | (set(layout["attentions"]) ^ set(attentions))
    if unknown:
        raise CheckpointError(
            f"the packed folder's config.json does not fit its model: unexpected or missing "
            f"{', '.join(str(name)[:120] for name in sorted(unknown)[:3])}."
        )
    of_activations, of_softmax = activation_grids(), softmax_grids()
    for name, spec in layout["layers"].items():
        layer = model.get_submodule(name)
        _check_channels(f"{name}.input", spec["input"], layer)
        quantizer = _build(spec["input"], of_activations)
        if spec["weight"] >= 16:
            packed = QuantizedLayer(layer, spec["weight"], quantizer)
        else:
            packed = PackedLayer.like(layer, spec["weight"], quantizer)
        replace_module(model, name, packed)
    for name, specs in layout["attentions"].items():
        operands = [_build(specs[which], of_activations) for which in OPERANDS[:3]]
        probs = _build(specs["probs"], of_softmax)
        attach_attention(model, attentions[name], sites, MatMulQuantizers(*operands, probs))
    sites.family.adapt(model)


def pack(model: PreTrainedModel, sites: Sites) -> PreTrainedModel:
    """Packs, in place, a model whose weights are integers; from here on it always quantizes.

    Raises:
        RuntimeError: A weight is not an integer or a range is missing.
    """
    for site in sites.layers:
        layer = model.get_submodule(site.name)
        if isinstance(layer, QuantizedLayer) and layer.weight_bits < 16:
            replace_module(model, site.name, PackedLayer.from_quantized(layer))
    for module in model.modules():
        if hasattr(module, "always"):
            if isinstance(module, SiteQuantizer) and not module.is_calibrated:
                raise RuntimeError("an activation quantizer has no range yet; did you run calibration first?")
            module.always = True
    return model
