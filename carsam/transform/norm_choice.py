"""How the channels of a norm are moved and scaled, by the error of the layer that reads it on held-out images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from carsam.bits.plan import BitPlan
from carsam.calibrate.counted import Counted, uncounted
from carsam.errors import ConfigError
from carsam.models.sites import Sites
from carsam.prompts.calibration import CalibrationSet
from carsam.quantizers.affine import decode, encode
from carsam.quantizers.ranges import observed_grid
from carsam.quantizers.rounding import weight_grid
from carsam.quantizers.sampling import odd_step_within, strided
from carsam.transform.calls import JUDGES
from carsam.transform.choice import LEAST_GAIN
from carsam.transform.norm_scale import scale_norm, shift_norm, smoothing
from carsam.transform.operands import Refused
from carsam.transform.statistics import ChannelStatistics, enough_in_encoder, hooked, input_statistics, pass_over

# Tokens of an image, and output channels that are looked at: each has a grid of its own, found by a search.
ROWS, CHANNELS = 512, 256
# Values that a range is found from.
SAMPLE_SIZE = 2**16


@dataclass
class _Rows:
    """Inputs of a layer, (rows, channels)."""

    fit: list[Tensor] = field(default_factory=list)
    judge: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def choose_norms(
    model: nn.Module,
    sites: Sites,
    data: CalibrationSet,
    plan: BitPlan,
    *,
    strengths: Sequence[float],
    shift: bool,
    observer: str = "mse",
    weight_observer: str = "mse",
    images: int = 9,
    strict: bool = False,
    counted: Counted = uncounted,
) -> list[dict[str, Any]]:
    """Moves and scales the channels of every norm that one Linear alone reads, where that lowers the Linear's error.

    Args:
        model: Float model; changed in place to one that computes the same.
        sites: The sites to treat.
        data: Calibration images; the first of them are used.
        plan: Bits of the layers.
        strengths: Strengths of the smoothing to try (:func:`carsam.transform.norm_scale.smoothing`), from 0 to 1.
        shift: Try to move channels to the middle of their range as well.
        observer, weight_observer: Of the ranges.
        images: Calibration images to use.
        strict: Raise where a move is refused, instead of noting it.
        counted: Given the norms.

    Returns:
        One report a norm, and one for every move that was refused.

    Raises:
        ConfigError: A strength is out of range.
        Refused: With ``strict``.
    """
    if not all(0 <= strength <= 1 for strength in strengths):
        raise ConfigError(f"strengths of the smoothing must lie in 0 to 1, not {list(strengths)}.")
    pairs = [(norm, layer) for norm, layer in sites.readers if _quantized(plan, layer)]
    if not pairs:
        return []
    statistics, hooks = input_statistics(model, [layer for _, layer in pairs])
    rows = _capture(model, sites, data, [layer for _, layer in pairs], images, hooks)
    reports: list[dict[str, Any]] = []
    for norm, layer in counted(pairs):
        if not rows[layer].fit:  # the memory of a video: a pass over an image does not reach it
            continue
        reader = model.get_submodule(layer)
        found, weight = statistics[layer], reader.weight.detach()
        fit = torch.cat(rows[layer].fit)
        judge = torch.cat(rows[layer].judge) if rows[layer].judge else fit
        bits = plan.activation_bits(f"{layer}.input"), plan.weight_bits(layer)
        middle = (found.low + found.high) / 2
        moves = [False]
        if shift:
            try:
                shift_norm(model, sites, norm, layer, torch.zeros_like(middle))  # asks the table and changes nothing
                moves.append(True)
            except Refused as refusal:
                if strict:
                    raise
                reports.append({"transform": "norm shift", "norm": norm, "refused": str(refusal)})
        some = weight[:: odd_step_within(len(weight), CHANNELS)]
        trials = [(moved, strength) for moved in moves for strength in (None, *strengths)]

        def error(trial: tuple[bool, float | None], of=(fit, judge, some, weight, found, middle, bits)) -> float:
            fit, judge, some, weight, found, middle, bits = of
            scale = _scale(found, weight, *trial)
            offset = middle if trial[0] else torch.zeros_like(middle)
            return _error(
                (fit - offset) / scale, (judge - offset) / scale, some * scale, bits, observer, weight_observer
            )

        errors = {trial: error(trial) for trial in trials}
        first, best = errors[trials[0]], min(trials, key=errors.get)
        if errors[best] >= (1 - LEAST_GAIN) * first:
            best = trials[0]
        moved, strength = best
        scale = _scale(found, weight, moved, strength)
        if moved:
            shift_norm(model, sites, norm, layer, middle)
        if strength is not None:
            scale_norm(model, norm, layer, scale)
        reports.append(
            {
                "transform": "norm",
                "norm": norm,
                "shifted": "yes" if moved else "no",
                "strength": "none" if strength is None else strength,
                "error": errors[best] / max(first, 1e-30),
            }
        )
    return reports


def _quantized(plan: BitPlan, layer: str) -> bool:
    return min(plan.weight_bits(layer), plan.activation_bits(f"{layer}.input")) < 16


def _scale(found: ChannelStatistics, weight: Tensor, moved: bool, strength: float | None) -> Tensor:
    if strength is None:
        return torch.ones_like(found.low)
    return smoothing(found, weight, strength, centred=moved).to(weight.dtype)


def _capture(
    model: nn.Module,
    sites: Sites,
    data: CalibrationSet,
    layers: list[str],
    images: int,
    others: Sequence[tuple[str, Callable[[Tensor, Tensor], None]]],
) -> dict[str, _Rows]:
    """Rows of the layers' inputs; the other hooks see the same passes."""
    rows = {layer: _Rows() for layer in layers}
    judging = False

    def see(layer: str, x: Tensor) -> None:
        flat = x.detach().flatten(0, -2)
        into = rows[layer].judge if judging else rows[layer].fit
        into.append(flat[:: odd_step_within(len(flat), ROWS)].clone())

    hooks = [(layer, lambda x, _out, layer=layer: see(layer, x)) for layer in layers]
    with hooked(model, [*others, *hooks]):
        for index, image in enumerate(data.images[:images]):
            if enough_in_encoder(data, index):  # norms that one layer alone reads lie in encoders
                break
            judging = index % JUDGES == JUDGES - 1
            pass_over(model, sites, image)
    return rows


def _error(
    fit: Tensor, judge: Tensor, weight: Tensor, bits: tuple[int, int], observer: str, weight_observer: str
) -> float:
    """‖X Wᵀ − X̂ Ŵᵀ‖² on the judges' rows, ranges from the others'."""
    of_inputs, of_weights = bits
    rounded, quantized = judge, weight
    if of_inputs < 16:
        # As records of sites are: their sample lies on the CPU, whose scalars go with tensors anywhere.
        low, high = (end.cpu()[None] for end in fit.aminmax())
        scale, zero = observed_grid(observer, low, high, strided(fit, SAMPLE_SIZE).cpu(), of_inputs)
        rounded = decode(encode(judge, scale, zero, of_inputs), scale, zero)
    if of_weights < 16:
        scale, zero = (each[:, None] for each in weight_grid(weight, of_weights, observer=weight_observer))
        quantized = decode(encode(weight, scale, zero, of_weights), scale, zero)
    return (judge @ weight.T - rounded @ quantized.T).square().sum().item()
