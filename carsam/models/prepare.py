"""Puts quantized layers and attentions into a float model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import SamModel

from carsam.bits.plan import BitPlan
from carsam.models.attention import MatMulQuantizers, QuantizedVisionAttention, attach_matmul_quantizers
from carsam.models.sites import AttentionSite, Sites, replace_module
from carsam.quantizers import QuantizedLayer

MakeQuantizer = Callable[[str, int], nn.Module]


def attach_attention(model: nn.Module, site: AttentionSite, matmul: MatMulQuantizers) -> None:
    """Gives one attention its MatMul quantizers."""
    attention = model.get_submodule(site.name)
    if site.fused:
        replace_module(model, site.name, QuantizedVisionAttention(attention, matmul))
    else:
        attach_matmul_quantizers(attention, matmul)


def prepare_model(
    model: SamModel, sites: Sites, plan: BitPlan, quantizer_for: MakeQuantizer, softmax_for: MakeQuantizer
) -> None:
    """Replaces, in place, every site by its quantized form; the model computes in floating point until simulated.

    Args:
        model: Float model.
        sites: Its sites.
        plan: Bits of every site.
        quantizer_for, softmax_for: Make the quantizer of an activation site from its name and bits.
    """
    plan.check(sites)
    for site in sites.linears:
        quantizer = quantizer_for(site.input, plan.activation_bits(site.input))
        layer = QuantizedLayer(model.get_submodule(site.name), plan.weight_bits(site.name), quantizer)
        replace_module(model, site.name, layer.to(layer.weight.device))
    for site in sites.attentions:
        operands = [
            quantizer_for(site.operand(which), plan.activation_bits(site.operand(which)))
            for which in ("query", "key", "value")
        ]
        probs = softmax_for(site.operand("probs"), plan.activation_bits(site.operand("probs")))
        attach_attention(model, site, MatMulQuantizers(*operands, probs))
