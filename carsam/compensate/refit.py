"""The refit applied to a unit: layers in the order of execution, each to what the quantized ones before it give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from carsam.calibrate.sensitivity import RowWeights, sampled_rows, unweighed
from carsam.compensate.passes import ROWS, QuantizedPasses, fitted_rows
from carsam.compensate.ridge import LayerMoments, Objective, centred, correct_bias, refit, round_with_feedback
from carsam.errors import ConfigError
from carsam.quantizers import QuantizedLayer, simulate

# λ relative to the mean diagonal, from next to none to next to no refit.
DAMPINGS = (0.01, 0.1, 1.0, 10.0)
# Every fourth calibration item judges them.
HELD_OUT = 4
WEIGHTS, BIAS, NONE = "weights", "bias", "none"


@dataclass(frozen=True)
class RefitSettings:
    """Settings of the ridge refit.

    Attributes:
        enabled: Whether it runs.
        damping: λ relative to the mean diagonal of X̂ᵀX̂; None chooses it for every layer by held-out calibration items,
            with the correction of the bias alone and no change at all among the choices.
        weights: Fit weights and biases; False corrects the biases alone.
        feedback: Round with feedback (GPTQ) where no rounding is learned afterwards.
        items: Calibration images that it uses, at most.
    """

    enabled: bool = True
    damping: float | None = None
    weights: bool = True
    feedback: bool = True
    items: int = 32

    def __post_init__(self):
        if self.damping is not None and self.damping <= 0:
            raise ConfigError("the damping of the refit must be positive: its equations are singular without it.")
        if self.items < 1:
            raise ConfigError("the refit needs at least one image.")


@dataclass
class RefitReport:
    """What became of one layer.

    Attributes:
        refitted: Its module path.
        kind: What was fitted: ``weights`` (with the bias), ``bias``, or ``none`` where either made held-out items
            worse.
        damping: λ in force, relative; None but for weights.
        change: ‖W* − W‖ / ‖W‖.
        error: ‖X W − X̂ W*‖² / ‖X W‖² before and after, weights not rounded.
        rounded: The same with weights rounded: to nearest before, as they are in the end after.
    """

    # Ranges of the unit were in force while it was fitted to them; they are not observed again.
    moves_ranges: ClassVar[bool] = False

    refitted: str
    kind: str
    damping: float | None
    change: float
    error: tuple[float, float]
    rounded: tuple[float, float]


def matrix(layer: QuantizedLayer) -> Tensor:
    """The weight as (groups, d, out / groups), with the bias as the last row where there is one."""
    groups = 1 if layer.conv is None else layer.conv["groups"]
    weight = layer.weight.detach().flatten(1).unflatten(0, (groups, -1)).transpose(1, 2)
    if layer.bias is None:
        return weight.clone()
    return torch.cat([weight, layer.bias.detach().view(groups, 1, -1)], dim=1)


@torch.no_grad()
def set_matrix(layer: QuantizedLayer, values: Tensor) -> None:
    """Puts back what :func:`matrix` gives, with other numbers."""
    if layer.bias is not None:
        layer.bias.copy_(values[:, -1].flatten())
        values = values[:, :-1]
    layer.weight.copy_(values.transpose(1, 2).flatten(0, 1).view(layer.weight.shape))
    layer.forget_rounding()


@torch.no_grad()
def refit_layers(
    model: nn.Module,
    passes: QuantizedPasses,
    floating: dict[str, list[Tensor]],
    settings: RefitSettings,
    *,
    feedback: bool,
    together: Sequence[Sequence[str]] = (),
    weight_observer: str = "mse",
    weights: RowWeights = unweighed,
) -> list[RefitReport]:
    """Fits layers again, one after the other, each to inputs that the ones before it give as they are now.

    Args:
        model: The model being quantized, ranges of the layers set, their weights in floating point.
        passes: Over the unit, one an item.
        floating: Rows of the layers' inputs in the float model on these items.
        settings: Of the refit.
        feedback: Round with feedback afterwards: the weights are then values of their grids.
        together: Layers none of which reads what another gives (the projections of an attention): where they follow
            one another, one pass serves all.
        weight_observer: For the grids that are fitted again to the new weights.
        weights: Of the squared errors of a layer's rows on an item; for all alike unless they are given.

    Returns:
        One report a layer.
    """
    layers: dict[str, QuantizedLayer] = {name: model.get_submodule(name) for name in passes.layers}
    reports = []
    for group in grouped(passes.layers, together):
        exact = {name: floating.pop(name) for name in group}
        gathered = _gather({name: layers[name] for name in group}, passes, exact, weights)
        for name in group:
            reports.append(_refit_layer(name, layers[name], gathered[name], settings, feedback, weight_observer))
    return reports


def grouped(names: Sequence[str], together: Sequence[Sequence[str]]) -> list[list[str]]:
    """Layers in order; neighbours that stand in one of the groups of ``together`` become one."""
    of = {name: number for number, group in enumerate(together) for name in group}
    groups: list[list[str]] = []
    for name in names:
        if groups and name in of and of.get(groups[-1][-1]) == of[name]:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _gather(
    layers: dict[str, QuantizedLayer], passes: QuantizedPasses, floating: dict[str, list[Tensor]], weights: RowWeights
) -> dict[str, tuple[LayerMoments, LayerMoments]]:
    """Moments of layers' inputs on the items that they are fitted to, and on those that judge.

    Args:
        layers: In the order of execution; none reads what another gives.
        passes: Passes that reach them.
        floating: Rows of their inputs in the float model, item by item.
        weights: Of the squared errors of a layer's rows on an item.
    """
    moments = {name: (LayerMoments(), LayerMoments()) for name in layers}
    for index, seen in enumerate(passes.inputs(list(layers))):
        with simulate(weights=True, activations=True, drop=0.0):
            for name, layer in layers.items():
                rounded = fitted_rows(layer, layer.input_quantizer(seen[name]))
                exact, own = floating[name][index], weights(name, index)
                if own is not None:
                    own = sampled_rows(own, ROWS).to(exact).sqrt()[None, :, None]
                    rounded, exact = rounded * own, exact * own
                moments[name][index % HELD_OUT == HELD_OUT - 1].update(rounded, exact)
    return moments


def _refit_layer(
    name: str,
    layer: QuantizedLayer,
    gathered: tuple[LayerMoments, LayerMoments],
    settings: RefitSettings,
    feedback: bool,
    weight_observer: str,
) -> RefitReport:
    ones, weight = layer.bias is not None, matrix(layer).double()
    moments = gathered[0] + gathered[1]
    objective = Objective(weight, moments)

    def rounded_error() -> float:
        with simulate(weights=True):
            simulated = layer.simulated_weight()
        found = matrix(layer).double()
        inputs = simulated.flatten(1).unflatten(0, (len(found), -1)).transpose(1, 2)
        found[:, : inputs.shape[1]] = inputs
        return objective.error(found)

    before = objective.error(weight), rounded_error()
    kind, damping = _choose(weight, *gathered, ones, settings)
    fitted = _fitted(weight, moments, ones, kind, damping)
    if kind != NONE:
        set_matrix(layer, fitted)
        layer.fit_weight(weight_observer)
    after = objective.error(fitted)
    if feedback and layer.weight_bits < 16:
        set_matrix(layer, _rounded(layer, fitted, moments, ones))
    change = ((fitted - weight).norm() / weight.norm().clamp(min=1e-30)).item()
    return RefitReport(name, kind, damping, change, (before[0], after), (before[1], rounded_error()))


def _fitted(weight: Tensor, moments: LayerMoments, ones: bool, kind: str, damping: float | None) -> Tensor:
    if kind == WEIGHTS:
        return refit(weight, moments, relative_damping=damping, ones=ones)
    return correct_bias(weight, moments) if kind == BIAS else weight


def _choose(
    weight: Tensor, fit: LayerMoments, judge: LayerMoments, ones: bool, settings: RefitSettings
) -> tuple[str, float | None]:
    """What is fitted and with which damping: what has the least error on items that it was not fitted to."""
    dampings = DAMPINGS if settings.damping is None else (settings.damping,)
    choices: list[tuple[str, float | None]] = [(BIAS, None)] if ones else []
    choices += [(WEIGHTS, damping) for damping in dampings] if settings.weights else []
    if settings.weights and settings.damping is not None:
        return WEIGHTS, settings.damping
    if judge.gram is None:
        return choices[-1] if choices else (NONE, None)  # too few items to judge: what holds on to the weight most
    objective = Objective(weight, judge)
    best, least = (NONE, None), objective.error(weight)
    for choice in choices:
        error = objective.error(_fitted(weight, fit, ones, *choice))
        if error < least:
            best, least = choice, error
    return best


def _rounded(layer: QuantizedLayer, fitted: Tensor, moments: LayerMoments, ones: bool) -> Tensor:
    """The fitted matrix with its weights on their grids, rounded with feedback, and the bias that follows."""
    groups = len(fitted)
    scale, zero = (each.double().view(groups, -1) for each in (layer.weight_scale, layer.weight_zero_point))
    weight = fitted[:, :-1] if ones else fitted
    gram = centred(moments.gram) if ones else moments.gram
    codes = round_with_feedback(weight, gram, scale, zero, layer.weight_bits)
    values = (codes - zero[:, None]) * scale[:, None]
    if not ones:
        return values
    mean = moments.gram[:, -1:, :-1] / moments.gram[:, -1:, -1:]
    return torch.cat([values, fitted[:, -1:] + mean @ (weight - values)], dim=1)
