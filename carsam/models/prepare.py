"""Puts quantized layers and attentions into a float model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from carsam.bits.plan import BitPlan
from carsam.models.attention import MatMulQuantizers
from carsam.models.sites import AttentionSite, Sites, replace_module
from carsam.quantizers import QuantizedLayer

MakeQuantizer = Callable[[str, int, str], nn.Module]
MakeSoftmax = Callable[[str, int], nn.Module]


def attach_attention(model: nn.Module, site: AttentionSite, sites: Sites, matmul: MatMulQuantizers) -> None:
    """Gives one attention its MatMul quantizers."""
    attention = model.get_submodule(site.name)
    quantized = sites.family.with_matmul(attention, matmul)
    if quantized is not attention:
        replace_module(model, site.name, quantized)


def prepare_model(
    model: nn.Module, sites: Sites, plan: BitPlan, quantizer_for: MakeQuantizer, softmax_for: MakeSoftmax
) -> None:
    """Replaces, in place, every site by its quantized form; the model computes in floating point until simulated.

    Args:
        model: Float model.
        sites: Its sites.
        plan: Bits of every site.
        quantizer_for: Makes the quantizer of an activation site from its name, bits and role (of the layer, or which
            operand of an attention it is).
        softmax_for: Makes the quantizer of a softmax output from its name and bits.
    """
    plan.check(sites)
    for site in sites.layers:
        quantizer = quantizer_for(site.input, plan.activation_bits(site.input), site.role)
        layer = QuantizedLayer(model.get_submodule(site.name), plan.weight_bits(site.name), quantizer)
        replace_module(model, site.name, layer.to(layer.weight.device))
    for site in sites.attentions:
        operands = [
            quantizer_for(site.operand(which), plan.activation_bits(site.operand(which)), which)
            for which in ("query", "key", "value")
        ]
        probs = softmax_for(site.operand("probs"), plan.activation_bits(site.operand("probs")))
        attach_attention(model, site, sites, MatMulQuantizers(*operands, probs))
