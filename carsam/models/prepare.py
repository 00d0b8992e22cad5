"""Puts quantized layers and attentions into a float model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from carsam.bits.plan import BitPlan
from carsam.models.attention import MatMulQuantizers
from carsam.models.sites import AttentionSite, Sites, replace_module
from carsam.quantizers import ActivationQuantizer, QuantizedLayer, UniformSoftmax

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

    # Where a plan leaves a part in floating point, its places are the same for every method: at 16 bits they do
    # nothing, and what the part gives can be shared.
    def quantizer(site: str, role: str) -> nn.Module:
        return ActivationQuantizer(16) if plan.leaves(site) else quantizer_for(site, plan.activation_bits(site), role)

    def softmax(site: str) -> nn.Module:
        return UniformSoftmax(16) if plan.leaves(site) else softmax_for(site, plan.activation_bits(site))

    for site in sites.layers:
        inputs = quantizer(site.input, site.role)
        layer = QuantizedLayer(model.get_submodule(site.name), plan.weight_bits(site.name), inputs)
        replace_module(model, site.name, layer.to(layer.weight.device))
    for site in sites.attentions:
        operands = [quantizer(site.operand(which), which) for which in ("query", "key", "value")]
        probs = softmax(site.operand("probs"))
        attach_attention(model, site, sites, MatMulQuantizers(*operands, probs))
    sites.family.adapt(model)
