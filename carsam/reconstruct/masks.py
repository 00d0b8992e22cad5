"""What the masks make of an error: how sensitive they are to a unit's outputs, and the decoder tuned on them.

A unit's loss counts every element of its outputs alike. The masks do not: they read one of the tokens, and of the image
what lies near the object. The masks here are the float model's own, so no label is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carsam.calibrate.cache import ActivationCache, CacheSpace
from carsam.errors import ConfigError
from carsam.models.family import Family, Tensors
from carsam.prompts.calibration import CalibrationImage
from carsam.quantizers import QuantizedLayer, SiteQuantizer
from carsam.reconstruct.judged import learn, split
from carsam.reconstruct.units import Unit

# Learned values are judged this many times along the way, and the best are kept.
JUDGED = 6


@dataclass
class MaskWeights:
    """Weights of a unit's squared errors: positions of every item times channels.

    Attributes:
        positions: Per item and output (n, ..., 1), mean 1 over the set.
        channels: Per output (channels,), mean 1.
        shares: Per output, how much of the masks' sensitivity is its; they sum to the number of outputs.
    """

    positions: ActivationCache
    channels: list[Tensor]
    shares: list[float]

    def batch(self, indices: list[int], device: torch.device) -> list[Tensor]:
        """Weights of some items, broadcasting against their outputs, in output order."""
        positions = self.positions.batch(indices, device).values()
        return [p * c.to(device) * s for p, c, s in zip(positions, self.channels, self.shares)]


@contextmanager
def leaves(model: nn.Module, unit: Unit, count: int, found: dict[int, Tensor]):
    """While the block runs the model, the unit's outputs are leaves that gradients reach; ``found`` holds them.

    Args:
        model: The float model.
        unit: The unit.
        count: Number of its outputs.
        found: Filled with the leaves by their number.
    """

    def cut(first: int) -> Callable:
        def hook(_module: nn.Module, _args: object, output: Tensor | tuple) -> Tensor | tuple:
            if isinstance(output, Tensor):
                found[first] = output.detach().requires_grad_()
                return found[first]
            own = count if len(unit.outputs) == 1 else 1
            found.update((first + i, output[i].detach().requires_grad_()) for i in range(own))
            return (*(found[first + i] for i in range(own)), *output[own:])

        return hook

    with ExitStack() as stack:
        for number, path in enumerate(unit.outputs):
            handle = model.get_submodule(path).register_forward_hook(cut(number))
            stack.callback(handle.remove)
        yield


def mask_weights(
    reference: nn.Module,
    unit: Unit,
    targets: ActivationCache,
    variances: list[float],
    encoded: ActivationCache,
    images: tuple[CalibrationImage, ...],
    family: Family,
    *,
    space: CacheSpace,
    device: torch.device,
    seed: int,
) -> MaskWeights | None:
    """How sensitive masks and predicted IoU are to the outputs of a decoder unit.

    The diagonal of JᵀJ, with J the derivative of mask probabilities and predicted IoU by the outputs, estimated with
    one random direction a prompt: E[(Jᵀr)²] = diag(JᵀJ) for r of independent standard normals. BRECQ weighs by the
    squared gradient of the task's loss (ICLR 2021, equation 10); there is no label here, and the masks are the task.
    One direction is noisy, so what is kept is its outer form: positions of each item (their mean over channels) times
    channels (their mean over all items).

    Args:
        reference: The float model.
        unit: The unit; None is returned where it does not say which modules give its outputs.
        targets: Its float outputs.
        variances: Of each output.
        encoded: The float model's embeddings.
        images: The calibration images.
        family: Of the model.
        space: For what is kept.
        device: Where the model is.
        seed: Of the directions.

    Raises:
        ConfigError: The family does not decode with gradients.
    """
    if not unit.outputs:
        return None
    count = len(targets.names)
    positions = space.cache()
    sums = [0.0] * count
    channels: list[Tensor | float] = [0.0] * count
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index, image in enumerate(images):
            found: dict[int, Tensor] = {}
            with torch.enable_grad(), leaves(reference, unit, count, found):
                logits, scores = decoded(family, reference, encoded.get(index, device), image)
                probabilities = torch.sigmoid(logits)
                pull = (probabilities * torch.randn(probabilities.shape).to(device)).sum() / math.sqrt(
                    probabilities[0].numel()
                ) + (scores * torch.randn(scores.shape).to(device)).sum()
                gradients = torch.autograd.grad(pull, [found[i] for i in range(count)], allow_unused=True)
            kept = {}
            for i, (name, gradient) in enumerate(zip(targets.names, gradients)):
                leaf = found[i]
                square = torch.zeros_like(leaf) if gradient is None else gradient.square()
                sums[i] += square.sum().item() * variances[i]
                channels[i] = channels[i] + square.flatten(0, -2).sum(0).cpu()
                kept[name] = square.mean(-1, keepdim=True)
            positions.append(_normalised(kept))
    total = sum(sums)
    if not math.isfinite(total) or total <= 0:
        return None
    return MaskWeights(
        positions,
        [c / c.mean().clamp(min=1e-30) for c in channels],
        [count * each / total for each in sums],
    )


def _normalised(weights: Tensors) -> Tensors:
    """Each item's positions have mean 1: an image counts as much as another."""
    return {name: w / w.mean().clamp(min=1e-30) for name, w in weights.items()}


def decoded(family: Family, model: nn.Module, encoded: Tensors, image: CalibrationImage) -> tuple[Tensor, Tensor]:
    """:meth:`carsam.models.family.Family.decode`, or what to do without it.

    Raises:
        ConfigError: The family does not decode with gradients.
    """
    result = family.decode(model, encoded, image)
    if result is None:
        raise ConfigError(
            f"{family.name} models cannot be tuned on their masks; set reconstruction.mask_weight and "
            "reconstruction.mask_steps to 0."
        )
    return result


@dataclass
class MaskReport:
    """How tuning on the masks went.

    Attributes:
        steps: Steps taken.
        before, after: The loss of the images that judge: squared errors of mask probabilities and predicted IoU over
            their variances.
        best: Step whose values are kept; 0 where every change was for the worse.
    """

    steps: int
    before: float
    after: float
    best: int


def tune_on_masks(
    model: nn.Module,
    scope: str,
    family: Family,
    encoded: ActivationCache,
    float_encoded: ActivationCache,
    reference: nn.Module,
    images: tuple[CalibrationImage, ...],
    *,
    steps: int,
    rate: float,
    norms: bool,
    seed: int,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
) -> MaskReport:
    """Learns what is left in floating point of a decoder of integers, on the masks of the float model.

    Weights are integers already and stay so. Learned are the steps of the activation grids (LSQ) and, with ``norms``,
    the weights and biases of the norms and the biases of the layers. Every fourth image judges; the values kept are
    the best of those along the way by its judgement, the first ones among them.

    Args:
        model: The quantized model.
        scope: Module path of what is tuned.
        family: Of the model.
        encoded: Embeddings of the calibration images by ``model``.
        float_encoded: And by ``reference``.
        reference: The float model.
        images: The calibration images.
        steps: Steps of one image each.
        rate: Adam's, relative to the step of a grid; a tenth of it for norms and biases.
        norms: See above.
        seed: Of the order of images.
        device: Where the models are.
        progress: Called with the number of steps done.

    Raises:
        ConfigError: The family does not decode with gradients.
    """
    part = model.get_submodule(scope)
    quantizers = [m for m in part.modules() if isinstance(m, SiteQuantizer) and m.bits < 16 and m.learns_scale]
    scales = [quantizer.learn_scale(relative=True) for quantizer in quantizers]
    floats = floats_of(part) if norms else []
    groups = [{"params": scales, "lr": rate}, {"params": floats, "lr": rate / 10}]
    with torch.no_grad():
        targets = [targets_of(family, reference, float_encoded.get(i, device), image) for i, image in enumerate(images)]
    spread = _spread(targets)
    pupils, judges = split(len(images))

    def loss(index: int) -> Tensor:
        logits, scores = decoded(family, model, encoded.get(index, device), images[index])
        goal, wanted = (each.to(device) for each in targets[index])
        mask = (torch.sigmoid(logits) - goal.float()).square().mean() / spread[0]
        return mask + (scores - wanted).square().mean() / spread[1]

    def draw() -> int:
        return pupils[int(torch.randint(len(pupils), ()))]

    for parameter in floats:
        parameter.requires_grad_(True)
    try:
        found = learn(groups, loss, draw, judges, steps=steps, points=JUDGED, seed=seed, progress=progress)
    finally:
        for parameter in floats:
            parameter.requires_grad_(False)
            parameter.grad = None
        for quantizer in quantizers:
            quantizer.settle()
    return MaskReport(steps, found.before, found.after, found.best)


def floats_of(part: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of norms, and biases of quantized layers."""
    found = []
    for module in part.modules():
        if isinstance(module, nn.LayerNorm):
            found += [p for p in (module.weight, module.bias) if p is not None]
        elif isinstance(module, QuantizedLayer) and module.bias is not None:
            found.append(module.bias)
    return found


def targets_of(
    family: Family, reference: nn.Module, encoded: Tensors, image: CalibrationImage
) -> tuple[Tensor, Tensor]:
    """The float model's masks (prompts, masks, h, w) as float16 probabilities, and predicted IoU (prompts, masks)."""
    logits, scores = decoded(family, reference, encoded, image)
    return torch.sigmoid(logits).half().cpu(), scores.cpu()


def _spread(targets: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Variance of mask probabilities (mean over images) and of predicted IoU (over all prompts)."""
    masks = sum(goal.float().var(unbiased=False).item() for goal, _ in targets) / len(targets)
    scores = torch.cat([wanted.flatten() for _, wanted in targets]).var(unbiased=False).item()
    return max(masks, 1e-6), max(scores, 1e-4)
