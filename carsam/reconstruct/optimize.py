"""The only optimiser loop: learned rounding and step sizes of one unit (METHOD.md, 3 and 4)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from carsam.calibrate.cache import ActivationCache
from carsam.calibrate.sensitivity import MaskSensitivity, OutputSensitivity
from carsam.errors import ConfigError
from carsam.quantizers import QuantizedLayer, SiteQuantizer, simulate
from carsam.quantizers.simulation import keep_mask
from carsam.reconstruct.losses import relative_loss
from carsam.reconstruct.units import Unit, run_unit

if TYPE_CHECKING:
    from carsam.compensate.passes import FloatRows
    from carsam.compensate.spread import Spread
    from carsam.reconstruct.masks import MaskWeights

# How rounding and steps of activations are learned: together, or one after the other.
PHASES = ("joint", "weights-first")
# Share of the steps that the weights get in two phases: BRECQ takes 20,000 for rounding and 5,000 for steps.
WEIGHT_SHARE = 0.8
# A value of α at which rounding is decided: h is 0 or 1 well before.
DECIDED = 10.0
# Methods take up to 20,000; more than this is a slip that would run for years.
MAX_STEPS = 10_000_000


@dataclass(frozen=True)
class ReconstructionSettings:
    """Settings of the optimiser loop.

    Attributes:
        steps: Optimiser steps of an encoder unit. PTQ4SAM takes 20,000 with rate 1e-3 for rounding; the default is
            a short schedule with a rate to match.
        decoder_steps: Of a decoder unit.
        images_per_step: Images whose blocks or prompts form one step.
        learn_rounding: AdaRound; otherwise weights round to nearest.
        rounding_rate: Adam's rate for α.
        rounding_weight: λ of AdaRound's regulariser.
        rounding_warmup: Share of the steps before it sets in.
        learn_scales: Learn the steps of activation grids (LSQ).
        scale_rate: Adam's rate for them, decayed by a cosine.
        relative_scales: The rate is relative to the step (its logarithm is learned); absolute as in PTQ4SAM otherwise.
        drop: QDrop's probability that an activation element stays in floating point; also the share of the unit's
            input taken from the float model. 0 is BRECQ.
        per_layer: Learn one layer at a time from its own input and output (AdaRound) instead of the unit as a whole.
        phases: ``joint`` learns rounding and steps of activations together. ``weights-first`` is BRECQ's way: rounding
            while activations stay in floating point, then steps with the weights decided.
        drop_probs: Whether softmax outputs are dropped as well. Their error at 4 bits is not noise that averages out: a
            broad row rounds to zero as a whole, so a unit trained on half-dropped rows meets rows of half the sum.
        mixed_precision: Matrix products of the loop take bfloat16 operands, forwards and backwards. Quantizers, losses
            and what is learned stay in single precision.
        mask_weight: Share of a decoder unit's loss in which errors are weighed by what the masks make of them
            (:mod:`carsam.reconstruct.masks`); 0 counts all elements alike.
        mask_optional: Leave both out, with a warning, where a model's masks cannot be differentiated (a video's memory)
            instead of refusing.
        mask_steps: Steps in which the finished decoder is tuned on the float model's masks; 0 leaves it out.
        mask_rate: Adam's rate there, relative to the step of a grid.
        mask_norms: Whether the norms and biases, which stay in floating point, are tuned with the grids.
    """

    steps: int = 300
    decoder_steps: int = 300
    images_per_step: int = 1
    learn_rounding: bool = True
    rounding_rate: float = 1e-2
    rounding_weight: float = 0.01
    rounding_warmup: float = 0.2
    learn_scales: bool = True
    scale_rate: float = 2e-3
    relative_scales: bool = True
    drop: float = 0.5
    drop_probs: bool = True
    per_layer: bool = False
    phases: str = "joint"
    mixed_precision: bool = False
    mask_weight: float = 0.0
    mask_optional: bool = False
    mask_steps: int = 0
    mask_rate: float = 2e-2
    mask_norms: bool = False

    def __post_init__(self):
        if self.phases not in PHASES:
            raise ConfigError(f"unknown phases {self.phases!r}; choose from {', '.join(PHASES)}.")
        if self.steps < 0 or self.decoder_steps < 0 or self.images_per_step < 1:
            raise ConfigError("steps must not be negative, and a step needs at least one image.")
        if max(self.steps, self.decoder_steps) > MAX_STEPS:
            raise ConfigError(f"steps must be at most {MAX_STEPS}.")
        if not 0 <= self.mask_weight <= 1 or self.mask_steps < 0 or self.mask_rate <= 0:
            raise ConfigError("mask_weight must lie in [0, 1], mask_steps not be negative, and mask_rate be positive.")
        if not 0 <= self.drop < 1:
            raise ConfigError(f"the drop probability must lie in [0, 1), not {self.drop}.")


@dataclass
class UnitReport:
    """How a unit's reconstruction went.

    Attributes:
        unit: Its name.
        steps: Steps taken.
        seconds: Wall-clock time of ranges, compensation and reconstruction.
        losses: (step, loss) points along the way.
        before, after: Relative squared error of every output before and after, always quantizing, on one pass.
    """

    unit: str
    steps: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)


def unit_seed(seed: int, unit: str) -> int:
    """A seed of the unit's own: a resumed run draws what the uninterrupted one would have drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{unit}".encode()).digest()[:7], "big")


@dataclass
class UnitData:
    """Cached data of one unit: inputs from the quantized-so-far and from the float model, float targets.

    ``weights`` says what the masks make of errors in the outputs, where the loss asks for it; ``sensitivity`` what they
    make of errors in its layers' outputs, ``rows`` what the layers read in the float model, where the method asks, and
    ``spreads`` how their outputs spread there.
    ``around(index)`` is entered where the finished unit is run on an item once more.
    """

    quantized: ActivationCache
    floating: ActivationCache
    targets: ActivationCache
    variances: list[float]
    weights: MaskWeights | OutputSensitivity | None = None
    sensitivity: MaskSensitivity | None = None
    rows: FloatRows | None = None
    spreads: dict[str, Spread] | None = None
    around: Callable[[int], AbstractContextManager[object]] = nullcontext

    def batch_targets(self, indices: list[int], device: torch.device) -> tuple[torch.Tensor, ...]:
        """Targets of some images, in output order."""
        return tuple(self.targets.batch(indices, device).values())


@torch.no_grad()
def relative_errors(
    model: nn.Module,
    unit: Unit,
    data: UnitData,
    device: torch.device,
    keep: Callable[[tuple[torch.Tensor, ...]], None] | None = None,
) -> list[float]:
    """Σ (output − target)² / Σ (target − mean)² of every output over all images, everything quantized.

    Args:
        model: The model being quantized.
        unit: The unit.
        data: Its cached inputs and targets.
        device: Where the unit runs.
        keep: Given each image's outputs, in order; an encoder unit's are the next one's inputs.
    """
    sums = [0.0] * len(data.variances)
    counts = [0] * len(data.variances)
    with simulate(weights=True, activations=True, drop=0.0):
        for index in range(len(data.quantized)):
            with data.around(index):
                outputs = run_unit(model, unit, data.quantized.get(index, device))
            if keep is not None:
                keep(outputs)
            for i, (output, target) in enumerate(zip(outputs, data.batch_targets([index], device))):
                sums[i] += (output - target).square().sum().item()
                counts[i] += target.numel()
    return [s / n / v for s, n, v in zip(sums, counts, data.variances)]


def optimise(
    model: nn.Module,
    unit: Unit,
    data: UnitData,
    settings: ReconstructionSettings,
    *,
    steps: int,
    seed: int,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
    learned: Callable[[nn.Module, Unit], None] | None = None,
) -> list[tuple[int, float]]:
    """Learns rounding and step sizes of one unit, then settles both: weights are integers afterwards.

    Args:
        model: The model being quantized; only the unit's modules change.
        unit: The unit.
        data: Its cached inputs and targets.
        settings: Of the loop.
        steps: Steps to take.
        seed: Of the run; the unit derives its own.
        device: Where the unit runs.
        progress: Called with the number of steps done.
        learned: Given model and unit when all is learned and no weight is an integer yet.

    Returns:
        ``(step, loss)`` points along the way.
    """
    losses: list[tuple[int, float]] = []
    layers = [m for module in unit.modules(model) for m in module.modules() if isinstance(m, QuantizedLayer)]
    quantizers = [
        m for module in unit.modules(model) for m in module.modules() if isinstance(m, SiteQuantizer) and m.bits < 16
    ]
    alphas = [layer.learn_rounding() for layer in layers] if settings.learn_rounding else []
    alphas = [alpha for alpha in alphas if alpha is not None]
    learning = [quantizer for quantizer in quantizers if settings.learn_scales and quantizer.learns_scale]
    scales = [quantizer.learn_scale(relative=settings.relative_scales) for quantizer in learning]
    fused = device.type in ("cpu", "cuda")
    optimisers = []
    if alphas:
        optimisers.append(torch.optim.Adam(alphas, lr=settings.rounding_rate, fused=fused))
    if scales:
        optimisers.append(torch.optim.Adam(scales, lr=settings.scale_rate, fused=fused))
    joint = settings.phases == "joint" or not alphas or not scales
    # Steps for rounding, and from which on steps of activations are learned.
    rounding_steps, first_scale_step = (steps, 0) if joint else (int(WEIGHT_SHARE * steps),) * 2
    warmup = int(settings.rounding_warmup * rounding_steps)
    # The rate of steps falls along a cosine from here, over so many steps.
    rate_from, scale_steps = first_scale_step, steps - first_scale_step

    try:
        state = {
            "weights": True,
            "activations": joint,
            "drop": settings.drop,
            "drop_probs": settings.drop_probs,
            "mixed": settings.mixed_precision,
        }
        with torch.random.fork_rng(), ExitStack() as simulation:
            simulation.enter_context(simulate(**state))
            torch.manual_seed(unit_seed(seed, unit.name))
            for step in range(steps if optimisers else 0):
                if not joint and step == rounding_steps:
                    _decide(layers, alphas)
                    simulation.enter_context(simulate(activations=True))
                order = torch.randperm(len(data.quantized))[: settings.images_per_step].tolist()
                inputs = data.quantized.batch(order, device)
                if settings.drop > 0:
                    # QDrop's mixed input: element-wise, from the quantized and the float model.
                    floating = data.floating.batch(order, device)
                    inputs = {
                        name: torch.lerp(floating[name], value, keep_mask(value.shape, settings.drop, device).float())
                        for name, value in inputs.items()
                    }
                if warmup <= step < rounding_steps and settings.rounding_weight > 0:
                    share = (step - warmup) / max(1, rounding_steps - warmup)
                    beta = 2 + (20 - 2) * (1 - share)
                    for layer in layers:
                        layer.penalty = (settings.rounding_weight, beta)
                targets = data.batch_targets(order, device)
                weights = _loss_weights(data.weights, settings.mask_weight, order, device)
                loss = relative_loss(run_unit(model, unit, inputs), targets, data.variances, unit.channel_dim, weights)
                for optimiser in optimisers:
                    optimiser.zero_grad(set_to_none=True)
                loss.backward()
                if scales and step >= rate_from:
                    rate = 0.5 * settings.scale_rate * (1 + math.cos(math.pi * (step - rate_from) / scale_steps))
                    optimisers[-1].param_groups[0]["lr"] = rate
                for optimiser in optimisers:
                    optimiser.step()
                share = (step + 1 - first_scale_step) / scale_steps
                changed = [quantizer.advance(share) for quantizer in learning]
                if any(changed):
                    # As AHCPTQ's public code: on other grids, steps are learned afresh.
                    optimisers[-1] = torch.optim.Adam(scales, lr=settings.scale_rate, fused=fused)
                    rate_from = step + 1
                if step % max(1, steps // 40) == 0 or step == steps - 1:
                    losses.append((step, loss.item()))
                if progress is not None:
                    progress(step + 1)
    finally:
        for quantizer in quantizers:
            quantizer.settle()
    if learned is not None:
        learned(model, unit)
    for layer in layers:
        layer.freeze()
    return losses


@torch.no_grad()
def _decide(layers: list[QuantizedLayer], alphas: list[nn.Parameter]) -> None:
    """Ends the learning of rounding before the weights become integers: every α says up or down for good."""
    for layer in layers:
        layer.penalty = None
    for alpha in alphas:
        alpha.copy_(torch.where(alpha >= 0, DECIDED, -DECIDED))
        alpha.requires_grad_(False)


def _loss_weights(
    weights: MaskWeights | OutputSensitivity | None, share: float, indices: list[int], device: torch.device
) -> list[torch.Tensor] | None:
    """Weights of the squared errors: the masks' with a share, 1 otherwise."""
    if weights is None or share == 0:
        return None
    return [(1 - share) + share * each for each in weights.batch(indices, device)]
