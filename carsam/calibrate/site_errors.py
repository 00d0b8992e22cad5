"""What each site alone costs: the float model with one weight or activation rounded to nearest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carsam.models.family import ENCODED, Tensors, family_of
from carsam.models.forward import predict_logits
from carsam.models.sites import OPERANDS, Sites
from carsam.prompts.image import PROMPTS_PER_BATCH, PromptedImage
from carsam.quantizers import QuantizedLayer, simulate


@dataclass(frozen=True)
class SitePart:
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


def parts_by_stage(rounded: nn.Module, sites: Sites) -> dict[str, list[SitePart]]:
    """Everything quantized, by encoder stage and for the whole decoder, in execution order."""
    last_layers = {
        [layer.name for layer in sites.layers if layer.name.startswith(site.name + ".")][-1]: site
        for site in sites.attentions
    }
    stages: dict[str, list[SitePart]] = {stage: [] for stage in (*sites.encoder_stages, sites.decoder)}
    for site in sites.layers:
        stage = next(stage for stage in stages if site.name.startswith(stage + "."))
        parts = []
        if site.name in last_layers:  # the projection after an attention's MatMuls
            attention = last_layers[site.name]
            matmul = rounded.get_submodule(attention.name).matmul
            for which in OPERANDS:
                name, bits = attention.operand(which), getattr(matmul, which).bits
                parts.append(SitePart(name, "activation", bits, f"{attention.name}.matmul", which))
        layer: QuantizedLayer = rounded.get_submodule(site.name)
        parts.append(SitePart(site.input, "activation", layer.input_quantizer.bits, site.name, "input_quantizer"))
        parts.append(SitePart(site.name, "weight", layer.weight_bits, site.name, "weight"))
        stages[stage] += [part for part in parts if part.bits < 16]
    return stages


@contextmanager
def swapped(base: nn.Module, rounded: nn.Module, part: SitePart) -> Iterator[None]:
    """Has the float model use one part of the rounded model within the block."""
    owner: nn.Module = base.get_submodule(part.owner)
    before = getattr(owner, part.attribute)
    setattr(owner, part.attribute, getattr(rounded.get_submodule(part.owner), part.attribute))
    try:
        yield
    finally:
        setattr(owner, part.attribute, before)


class SiteErrors:
    """Tries one site after the other on images with prompts.

    Passes start where the site lies: encoder stages before it are not computed again, and sites of the decoder start
    from the float image embedding.

    Args:
        base: A float model with the quantizers' places; changed only while a site is tried.
        sites: Its sites.
        samples: Images with prompts.
    """

    def __init__(self, base: nn.Module, sites: Sites, samples: Sequence[PromptedImage]):
        self._base, self._samples = base, samples
        encoder, _ = sites.family.parts(sites)
        self._encoder, self._order = encoder, list(encoder.stages)
        with torch.no_grad():
            # Inputs of every stage; the last are the embeddings. A part without stages is encoded as a whole.
            self._inputs = [[self._first(sample) for sample in samples]]
            for stage in self._order:
                self._inputs.append([stage.step(self._base, values) for values in self._inputs[-1]])
            self.targets = [self._logits(values[ENCODED], sample) for values, sample in zip(self._inputs[-1], samples)]

    def _first(self, sample: PromptedImage) -> Tensors:
        if self._order:
            return self._encoder.enter(self._base, {}, sample)
        family = family_of(self._base)
        return {ENCODED: family.encode_image(self._base, sample.pixel_values.to(self._base.device))}

    def _logits(self, embedding: Tensor, sample: PromptedImage) -> Tensor:
        """Low-resolution mask logits (P, h, w) over the image, without its padding."""
        batches = sample.boxes.split(PROMPTS_PER_BATCH)
        low_res = torch.cat([predict_logits(self._base, embedding, boxes=boxes)[0][:, 0] for boxes in batches])
        if sample.geometry is None:
            return low_res
        side = family_of(self._base).image_size(self._base)
        height, width = (max(1, round(size / side * low_res.shape[-1])) for size in sample.geometry.input_size)
        return low_res[:, :height, :width]

    @torch.no_grad()
    def logits_with(self, rounded: nn.Module, part: SitePart, stage: int) -> list[Tensor]:
        """Mask logits of every sample with one part rounded.

        Args:
            rounded: The model that the part comes from.
            part: The part.
            stage: Number of the stage that it lies in (:func:`parts_by_stage`); the decoder's is the last.
        """
        with swapped(self._base, rounded, part), simulate(weights=True, activations=True):
            found = []
            for values, sample in zip(self._inputs[stage], self._samples):
                for each in self._order[stage:]:
                    values = each.step(self._base, values)
                found.append(self._logits(values[ENCODED], sample))
            return found


def relative_error(found: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Σ (found − target)² / Σ (target − mean)² over all of them."""
    error = sum((a - b).square().sum(dtype=torch.float64).item() for a, b in zip(found, targets))
    flat = torch.cat([target.double().flatten() for target in targets])
    return error / max((flat - flat.mean()).square().sum().item(), 1e-30)


def every_part(
    rounded: nn.Module,
    sites: Sites,
    errors: SiteErrors,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Iterator[tuple[SitePart, list[Tensor]]]:
    """Every part of a rounded model with the logits that it alone gives, in execution order.

    Args:
        rounded: Nearest rounding of the float model in ``errors``.
        sites: Its sites.
        errors: The float model and the images.
        progress: Called as ``progress(parts_done, n_parts)``.
    """
    numbered = list(numbered_parts(rounded, sites))
    for done, (part, stage) in enumerate(numbered, 1):
        yield part, errors.logits_with(rounded, part, stage)
        progress(done, len(numbered))


def numbered_parts(rounded: nn.Module, sites: Sites) -> Iterator[tuple[SitePart, int]]:
    """Every part of a rounded model with the number of its stage, in execution order."""
    for stage, parts in enumerate(parts_by_stage(rounded, sites).values()):
        for part in parts:
            yield part, stage
