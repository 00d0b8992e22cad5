"""The layout of a packed model: which sites are quantized, with which grids and bits.

It is what ``quantization_config`` in ``config.json`` holds, and all that is needed to build the packed form of a float
model before its tensors are loaded.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import SamModel

from carsam.errors import CheckpointError
from carsam.models.attention import MatMulQuantizers
from carsam.models.prepare import attach_attention
from carsam.models.sites import OPERANDS, Sites, find_sites, replace_module
from carsam.pack.layers import PackedLayer
from carsam.quantizers import SOFTMAX_GRIDS, ActivationQuantizer, QuantizedLayer

FORMAT_VERSION = 1
ACTIVATION_GRIDS = {ActivationQuantizer.grid: ActivationQuantizer}


def describe(model: SamModel, sites: Sites) -> dict[str, Any]:
    """The layout of a model whose layers are quantized or packed.

    Returns:
        ``{"layers": {path: {"weight": bits, "input": grid}}, "attentions": {path: {operand: grid}}}`` where a grid is
        ``{"grid": name, "bits": bits}``.
    """
    layers = {}
    for site in sites.linears:
        layer = model.get_submodule(site.name)
        if isinstance(layer, (QuantizedLayer, PackedLayer)):
            layers[site.name] = {"weight": layer.weight_bits, "input": _grid(layer.input_quantizer)}
    attentions = {}
    for site in sites.attentions:
        matmul = model.get_submodule(site.name).matmul
        attentions[site.name] = {which: _grid(getattr(matmul, which)) for which in OPERANDS}
    return {"layers": layers, "attentions": attentions}


def _grid(quantizer: nn.Module) -> dict[str, Any]:
    return {"grid": quantizer.grid, "bits": quantizer.bits}


def _build(spec: dict[str, Any], grids: dict[str, type[nn.Module]]) -> nn.Module:
    if spec["grid"] not in grids:
        raise CheckpointError(
            f"the packed model uses the grid {spec['grid']!r}, which this version of carsam does not know "
            f"(it knows {', '.join(grids)}); install a newer carsam."
        )
    return grids[spec["grid"]](spec["bits"], always=True)


def build_packed(model: SamModel, layout: dict[str, Any]) -> None:
    """Turns a float model, in place, into the (empty) packed form that a layout describes.

    Raises:
        CheckpointError: The layout does not fit the model.
    """
    sites = find_sites(model)
    linears = {site.name for site in sites.linears}
    attentions = {site.name: site for site in sites.attentions}
    unknown = (set(layout["layers"]) - linears) | (set(layout["attentions"]) ^ set(attentions))
    if unknown:
        raise CheckpointError(
            f"the packed folder's config.json does not fit its model: unexpected or missing {sorted(unknown)[:3]}."
        )
    for name, spec in layout["layers"].items():
        layer = model.get_submodule(name)
        quantizer = _build(spec["input"], ACTIVATION_GRIDS)
        if spec["weight"] >= 16:
            packed = QuantizedLayer(layer, spec["weight"], quantizer)
        else:
            packed = PackedLayer.like(layer, spec["weight"], quantizer)
        replace_module(model, name, packed)
    for name, specs in layout["attentions"].items():
        operands = [_build(specs[which], ACTIVATION_GRIDS) for which in OPERANDS[:3]]
        probs = _build(specs["probs"], SOFTMAX_GRIDS)
        attach_attention(model, attentions[name], MatMulQuantizers(*operands, probs))


def pack(model: SamModel, sites: Sites) -> SamModel:
    """Packs, in place, a model whose weights are integers; from here on it always quantizes.

    Raises:
        RuntimeError: A weight is not an integer or a range is missing.
    """
    for site in sites.linears:
        layer = model.get_submodule(site.name)
        if isinstance(layer, QuantizedLayer) and layer.weight_bits < 16:
            replace_module(model, site.name, PackedLayer.from_quantized(layer))
    for module in model.modules():
        if hasattr(module, "always"):
            if isinstance(module, ActivationQuantizer) and not module.is_calibrated:
                raise RuntimeError("an activation quantizer has no range yet; did you run calibration first?")
            module.always = True
    return model
