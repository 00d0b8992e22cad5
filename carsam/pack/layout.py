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
from carsam.quantizers import ACTIVATION_GRIDS, SOFTMAX_GRIDS, QuantizedLayer, SiteQuantizer

FORMAT_VERSION = 1


def describe(model: SamModel, sites: Sites) -> dict[str, Any]:
    """The layout of a model whose layers are quantized or packed.

    Returns:
        ``{"layers": {path: {"weight": bits, "input": grid}}, "attentions": {path: {operand: grid}}}`` where a grid is
        ``{"grid": name, "bits": bits}``, with what else builds its quantizer again.
    """
    layers = {}
    for site in sites.linears:
        layer = model.get_submodule(site.name)
        if isinstance(layer, (QuantizedLayer, PackedLayer)):
            layers[site.name] = {"weight": layer.weight_bits, "input": layer.input_quantizer.spec()}
    attentions = {}
    for site in sites.attentions:
        matmul = model.get_submodule(site.name).matmul
        attentions[site.name] = {which: getattr(matmul, which).spec() for which in OPERANDS}
    return {"layers": layers, "attentions": attentions}


def _build(spec: dict[str, Any], grids: dict[str, type[nn.Module]]) -> nn.Module:
    if spec["grid"] not in grids:
        raise CheckpointError(
            f"the packed model uses the grid {spec['grid']!r}, which this version of carsam does not know "
            f"(it knows {', '.join(grids)}); install a newer carsam."
        )
    arguments = {name: value for name, value in spec.items() if name != "grid"}
    try:
        return grids[spec["grid"]](**arguments, always=True)
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(f"config.json describes the grid {spec} wrongly: {error}; get it again.") from None


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
            if isinstance(module, SiteQuantizer) and not module.is_calibrated:
                raise RuntimeError("an activation quantizer has no range yet; did you run calibration first?")
            module.always = True
    return model
