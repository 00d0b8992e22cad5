"""Both models over the images, side by side: one pass that feeds attention maps, site values and masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from carsam.diagnose.attention_maps import DissipationMeter, MapRecorder
from carsam.diagnose.pair import Pair
from carsam.diagnose.results import AttentionResult, SiteValues
from carsam.diagnose.site_values import ValueRecorder
from carsam.models.forward import encode_image, predict_logits
from carsam.prompts.image import PROMPTS_PER_BATCH, PromptedImage

# The decoder's tokens are the IoU token, then the mask tokens; without multimask output the first of those is used.
MASK_TOKEN = 1


@dataclass(frozen=True)
class Outcome:
    """What both models made of one image.

    Attributes:
        logits: Low-resolution mask logits (P, h, w) of the float and of the packed model.
        focus: By token→image attention: the mask token's rows (heads, keys) of both models, for the first prompt.
    """

    logits: tuple[Tensor, Tensor]
    focus: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Passes:
    """What the passes gave.

    Attributes:
        outcomes: One an image.
        embeddings: Image embeddings (1, C, h, w) of the float and of the packed model, on the CPU.
        attentions: Dissipation of every attention.
        sites: What every activation site of the packed model saw.
    """

    outcomes: tuple[Outcome, ...]
    embeddings: tuple[list[Tensor], list[Tensor]]
    attentions: tuple[AttentionResult, ...]
    sites: tuple[SiteValues, ...]


@torch.no_grad()
def run_passes(
    pair: Pair, samples: tuple[PromptedImage, ...], progress: Callable[[int, int], None] = lambda *_: None
) -> Passes:
    """Runs both models, each on its own activations, stage by stage: only one attention's maps are held at a time.

    Args:
        pair: The models.
        samples: Images with prompts.
        progress: Called as ``progress(images_done, n_images)``.
    """
    meter = DissipationMeter(pair.sites)
    values = ValueRecorder(pair.packed, pair.sites)
    recorders = [MapRecorder(model, pair.sites) for model in pair.models]
    outcomes: list[Outcome] = []
    embeddings: tuple[list[Tensor], list[Tensor]] = ([], [])
    with recorders[0].recording(), recorders[1].recording(), values.recording():
        for done, sample in enumerate(samples, start=1):
            found = _encode(pair, sample, meter, recorders)
            outcomes.append(_decode(pair, sample, found, meter, recorders))
            for kept, embedding in zip(embeddings, found):
                kept.append(embedding.cpu())
            progress(done, len(samples))
    return Passes(tuple(outcomes), embeddings, meter.results(recorders[0].queries), values.results())


def _encode(pair: Pair, sample: PromptedImage, meter: DissipationMeter, recorders: list[MapRecorder]) -> list[Tensor]:
    family = pair.sites.family
    encoder, _ = family.parts(pair.sites)
    streams = [encoder.enter(model, {}, sample) for model in pair.models]
    for stage in encoder.stages:
        outputs = [stage.run(model, values) for model, values in zip(pair.models, streams)]
        _compare(meter, recorders, family.valid_queries(pair.reference.get_submodule(stage.name), streams[0]))
        if stage.following is not None:
            outputs = [stage.following(*each) for each in zip(pair.models, streams, outputs)]
        streams = outputs
    return [values["hidden_states"] for values in streams]


def _decode(
    pair: Pair, sample: PromptedImage, embeddings: list[Tensor], meter: DissipationMeter, recorders: list[MapRecorder]
) -> Outcome:
    names = pair.sites.focus
    logits: tuple[list[Tensor], list[Tensor]] = ([], [])
    focus: dict[str, tuple[Tensor, Tensor]] = {}
    for boxes in sample.boxes.split(PROMPTS_PER_BATCH):
        for kept, model, embedding in zip(logits, pair.models, embeddings):
            kept.append(predict_logits(model, embedding, boxes=boxes)[0][:, 0].cpu())
        maps = _compare(meter, recorders, None)
        if not focus:
            focus = {name: tuple(each[0, :, MASK_TOKEN].cpu() for each in maps[name]) for name in names}
    return Outcome(tuple(torch.cat(each) for each in logits), focus)


def _compare(
    meter: DissipationMeter, recorders: list[MapRecorder], valid: Tensor | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Takes the maps of one stage, or of the decoder, into the sums."""
    floating, quantized = (recorder.take() for recorder in recorders)
    for name, probs in floating.items():
        meter.update(name, probs, quantized[name], valid)
    return {name: (probs, quantized[name]) for name, probs in floating.items()}


def encode_images(model: nn.Module, pair: Pair, samples: tuple[PromptedImage, ...]) -> list[Tensor]:
    """Image embeddings (1, C, h, w) of a model, on the CPU."""
    with torch.no_grad():
        return [encode_image(model, sample.pixel_values).cpu() for sample in samples]
