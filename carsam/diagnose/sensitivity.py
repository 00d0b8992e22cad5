"""How much each site alone costs: the float model with one weight or activation rounded to nearest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carsam.diagnose.measures import RelativeError
from carsam.diagnose.results import SiteSensitivity
from carsam.evaluate.points import mask_iou
from carsam.models.family import Stage, Tensors, family_of
from carsam.models.forward import predict_logits
from carsam.models.sites import OPERANDS, Sites
from carsam.prompts.image import PROMPTS_PER_BATCH, PromptedImage
from carsam.quantizers import QuantizedLayer, simulate

# Images that sensitivity is measured on: every one costs a pass for every site.
MAX_IMAGES = 4


@dataclass(frozen=True)
class Part:
    """One quantized thing of the rounded model, and where it stands in the float one.

    Attributes:
        site: Its name.
        kind: ``weight`` or ``activation``.
        bits: Bits of a code.
        owner: Module path whose attribute it is, in both models.
        attribute: Name of the attribute.
    """

    site: str
    kind: str
    bits: int
    owner: str
    attribute: str


def parts_by_stage(rounded: nn.Module, sites: Sites) -> dict[str, list[Part]]:
    """Everything quantized, by encoder stage and for the whole decoder, in execution order."""
    last_layers = {
        [layer.name for layer in sites.layers if layer.name.startswith(site.name + ".")][-1]: site
        for site in sites.attentions
    }
    stages: dict[str, list[Part]] = {stage: [] for stage in (*sites.encoder_stages, sites.decoder)}
    for site in sites.layers:
        stage = next(stage for stage in stages if site.name.startswith(stage + "."))
        parts = []
        if site.name in last_layers:  # the projection after an attention's MatMuls
            attention = last_layers[site.name]
            matmul = rounded.get_submodule(attention.name).matmul
            for which in OPERANDS:
                name, bits = attention.operand(which), getattr(matmul, which).bits
                parts.append(Part(name, "activation", bits, f"{attention.name}.matmul", which))
        layer: QuantizedLayer = rounded.get_submodule(site.name)
        parts.append(Part(site.input, "activation", layer.input_quantizer.bits, site.name, "input_quantizer"))
        parts.append(Part(site.name, "weight", layer.weight_bits, site.name, "weight"))
        stages[stage] += [part for part in parts if part.bits < 16]
    return stages


@contextmanager
def swapped(base: nn.Module, rounded: nn.Module, part: Part) -> Iterator[None]:
    """Has the float model use one part of the rounded model within the block."""
    owner: nn.Module = base.get_submodule(part.owner)
    before = getattr(owner, part.attribute)
    setattr(owner, part.attribute, getattr(rounded.get_submodule(part.owner), part.attribute))
    try:
        yield
    finally:
        setattr(owner, part.attribute, before)


@torch.no_grad()
def sensitivity(
    base: nn.Module,
    rounded: nn.Module,
    sites: Sites,
    samples: tuple[PromptedImage, ...],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> tuple[SiteSensitivity, ...]:
    """Rounds every site alone and measures the masks.

    Passes start where the site lies: encoder stages before it are not computed again, and sites of the decoder start
    from the float image embedding.

    Args:
        base: The float model that ``rounded`` was made from, with quantizers' places; changed only while a site is
            tried.
        rounded: Nearest rounding of it.
        sites: The sites of both models.
        samples: Images with prompts.
        progress: Called as ``progress(sites_done, n_sites)``.

    Returns:
        One entry a part, in execution order.
    """
    stages = parts_by_stage(rounded, sites)
    encoder, _ = sites.family.parts(sites)
    order = list(encoder.stages)
    total, results = sum(len(parts) for parts in stages.values()), []

    def embed(values: Tensors, begin: int) -> Tensor:
        for stage in order[begin:]:
            values = step(stage, values)
        return values["hidden_states"]

    def step(stage: Stage, values: Tensors) -> Tensors:
        outputs = stage.run(base, values)
        return outputs if stage.following is None else stage.following(base, values, outputs)

    inputs = [encoder.enter(base, {}, sample) for sample in samples]
    targets = [_logits(base, embed(hidden, 0), sample) for hidden, sample in zip(inputs, samples)]
    for number, parts in enumerate(stages.values()):
        for part in parts:
            error, ious = RelativeError(), []
            with swapped(base, rounded, part), simulate(weights=True, activations=True):
                for hidden, sample, target in zip(inputs, samples, targets):
                    logits = _logits(base, embed(hidden, number), sample)
                    error.update(logits, target)
                    ious += [mask_iou(*pair) for pair in zip((logits > 0).cpu().numpy(), (target > 0).cpu().numpy())]
            results.append(SiteSensitivity(part.site, part.kind, part.bits, error.value, sum(ious) / len(ious)))
            progress(len(results), total)
        if number < len(order):
            inputs = [step(order[number], values) for values in inputs]
    return tuple(results)


def _logits(model: nn.Module, embedding: Tensor, sample: PromptedImage) -> Tensor:
    """Low-resolution mask logits (P, h, w) over the image, without its padding."""
    batches = sample.boxes.split(PROMPTS_PER_BATCH)
    low_res = torch.cat([predict_logits(model, embedding, boxes=boxes)[0][:, 0] for boxes in batches])
    side = family_of(model).image_size(model)
    height, width = (max(1, round(size / side * low_res.shape[-1])) for size in sample.geometry.input_size)
    return low_res[:, :height, :width]
