"""The finished model tuned as a whole: all that is no integer, on the float model's masks and embeddings.

Units are reconstructed one after the other, each for its own outputs. What they leave adds up on the way to the masks,
and no unit sees it. Here all of them are run at once, from pixels to masks, and learned is what floats around the
integers: the steps of activations, the scales of weights, norms and biases. The integers stay as they are, so that few
values are learned from few images. EfficientQAT tunes a language model's steps so after its blocks
(arXiv 2407.11062, E2E-QP).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from carsam.calibrate.cache import ActivationCache
from carsam.errors import ConfigError
from carsam.models.family import Family, Part, Tensors
from carsam.prompts.calibration import CalibrationImage
from carsam.quantizers import QuantizedLayer, SiteQuantizer
from carsam.reconstruct.judged import learn, split
from carsam.reconstruct.masks import decoded, floats_of, targets_of
from carsam.reconstruct.optimize import MAX_STEPS

# Learned values are judged this many times along the way, and the best are kept.
JUDGED = 5
# Rates of weights' scales, and of norms and biases, relative to that of activations' steps.
WEIGHT_RATE, FLOAT_RATE = 0.5, 0.3
# A predicted IoU's error beside that of a mask.
SCORE_SHARE = 0.1
# Images of at least so many pixels are computed twice instead of kept: activations of ViT-B at 1024 px take gigabytes.
CHECKPOINTED = 512 * 512


@dataclass(frozen=True)
class TuningSettings:
    """Of the tuning of the whole model.

    Attributes:
        steps: Steps of one image each; 0 leaves it out.
        rate: Adam's, for the logarithm of activations' steps.
    """

    steps: int = 0
    rate: float = 1e-3

    def __post_init__(self):
        if self.steps < 0 or self.rate <= 0:
            raise ConfigError("steps of the tuning must not be negative, and its rate must be positive.")
        if self.steps > MAX_STEPS:
            raise ConfigError(f"steps of the tuning must be at most {MAX_STEPS}.")


@dataclass
class TuningReport:
    """How it went.

    Attributes:
        steps: Steps taken.
        before, after: The loss of the images that judge.
        best: Step whose values are kept; 0 where every change was for the worse.
        values: Numbers that were learned.
    """

    steps: int
    before: float
    after: float
    best: int
    values: int


def mask_error(logits: Tensor, goal: Tensor) -> Tensor:
    """Squared error of masks (prompts, masks, h, w) relative to the energy of both, mean over masks: 0 to 1.

    Of two masks without grey it is (1 − IoU)/(1 + IoU), so objects of every size count alike.
    """
    found = torch.sigmoid(logits)
    energy = (found.square() + goal.square()).sum((-2, -1)).clamp(min=1.0)
    return ((found - goal).square().sum((-2, -1)) / energy).mean()


class _Losses:
    """The loss of every calibration image."""

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        family: Family,
        encoder: Part | None,
        encoded: ActivationCache,
        float_encoded: ActivationCache,
        images: tuple[CalibrationImage, ...],
        device: torch.device,
    ):
        self.model, self.family, self.encoder, self.images, self.device = model, family, encoder, images, device
        self.encoded, self.float_encoded = encoded, float_encoded
        with torch.no_grad():
            self.goals = [
                targets_of(family, reference, float_encoded.get(i, device), each) for i, each in enumerate(images)
            ]
        scores = torch.cat([scores.flatten() for _, scores in self.goals])
        self.spread = max(scores.var(unbiased=False).item(), 1e-4)

    def _encode(self, index: int) -> Tensors:
        if self.encoder is None:
            return self.encoded.get(index, self.device)
        image = self.images[index]
        values = self.encoder.enter(self.model, {}, image)
        for stage in self.encoder.stages:
            if torch.is_grad_enabled() and image.pixel_values[0, 0].numel() >= CHECKPOINTED:
                values = checkpoint(stage.step, self.model, values, use_reentrant=False)
            else:
                values = stage.step(self.model, values)
        return values

    def __call__(self, index: int) -> Tensor:
        values = self._encode(index)
        logits, scores = decoded(self.family, self.model, values, self.images[index])
        goal, wanted = (each.to(self.device) for each in self.goals[index])
        loss = mask_error(logits, goal.float()) + SCORE_SHARE * (scores - wanted).square().mean() / self.spread
        if self.encoder is not None:
            floats = self.float_encoded.get(index, self.device)
            for name, each in floats.items():
                loss = loss + (values[name] - each).square().mean() / each.var().clamp(min=1e-12) / len(floats)
        return loss


def tune(
    model: nn.Module,
    reference: nn.Module,
    family: Family,
    encoder: Part | None,
    encoded: ActivationCache,
    float_encoded: ActivationCache,
    images: tuple[CalibrationImage, ...],
    scopes: tuple[str, ...],
    settings: TuningSettings,
    *,
    seed: int,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
) -> TuningReport:
    """Learns what floats around the integers of a quantized model. Every fourth image judges; the best is kept.

    Args:
        model: The quantized model, every weight an integer.
        reference: The float model.
        family: Of both.
        encoder: The part that makes embeddings of pixels; None where it stays in floating point.
        encoded: Embeddings of the calibration images by ``model``, read where the encoder stays as it is.
        float_encoded: And by ``reference``.
        images: The calibration images.
        scopes: Module paths of what is tuned.
        settings: Of the tuning.
        seed: Of the order of images.
        device: Where the models are.
        progress: Called with the number of steps done.

    Raises:
        ConfigError: The family does not decode with gradients.
    """
    parts = [model.get_submodule(scope) for scope in scopes]
    modules = list(dict.fromkeys(module for part in parts for module in part.modules()))
    quantizers = [m for m in modules if isinstance(m, SiteQuantizer) and m.bits < 16 and m.learns_scale]
    layers = [m for m in modules if isinstance(m, QuantizedLayer) and m.codes is not None]
    floats = [each for part in parts for each in floats_of(part)]
    groups = [
        {"params": [quantizer.learn_scale(relative=True) for quantizer in quantizers], "lr": settings.rate},
        {"params": [layer.learn_scales() for layer in layers], "lr": WEIGHT_RATE * settings.rate},
        {"params": floats, "lr": FLOAT_RATE * settings.rate},
    ]
    values = sum(each.numel() for group in groups for each in group["params"])
    loss = _Losses(model, reference, family, encoder, encoded, float_encoded, images, device)
    pupils, judges = split(len(images))
    order: list[int] = []

    def draw() -> int:
        nonlocal order
        order = order or torch.randperm(len(pupils)).tolist()
        return pupils[order.pop()]

    for parameter in floats:
        parameter.requires_grad_(True)
    options = {"steps": settings.steps, "points": JUDGED, "seed": seed, "progress": progress}
    try:
        found = learn(groups, loss, draw, judges, **options)
    finally:
        for parameter in floats:
            parameter.requires_grad_(False)
            parameter.grad = None
        for each in (*quantizers, *layers):
            each.settle()
    return TuningReport(settings.steps, found.before, found.after, found.best, values)
