"""The refit applied to a unit: layers in the order of execution, each to what the quantized ones before it give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from carsam.calibrate.sensitivity import RowWeights, unweighed
from carsam.compensate.passes import QuantizedPasses, grouped, matrix, set_matrix, weights_of_rows
from carsam.compensate.ridge import LayerMoments, Objective, centred, correct_bias, refit, round_with_feedback
from carsam.compensate.spread import OutputSums, Spread, restore
from carsam.errors import ConfigError
from carsam.quantizers import QuantizedLayer, simulate
from carsam.quantizers.sampling import odd_step_within

# λ relative to the mean diagonal, from next to none to next to no refit.
DAMPINGS = (0.01, 0.1, 1.0, 10.0)
# Every fourth calibration item judges them.
HELD_OUT = 4
# Output channels of a layer that its errors are told from, and the choice by them.
CHANNELS = 512
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
        spread: Share of the spread which outputs lose by the fit and by learning that is given back to them
            (:mod:`carsam.compensate.spread`).
        items: Calibration images that it uses, at most.
    """

    enabled: bool = True
    damping: float | None = None
    weights: bool = True
    feedback: bool = True
    spread: float = 1.0
    items: int = 32

    def __post_init__(self):
        if self.damping is not None and self.damping <= 0:
            raise ConfigError("the damping of the refit must be positive: its equations are singular without it.")
        if not 0 <= self.spread <= 2:
            raise ConfigError(f"the share of the spread that is given back must lie in 0 to 2, not {self.spread}.")
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
        error: ‖X W − X̂ W*‖² / ‖X W‖² before and after, weights not rounded, over :data:`CHANNELS` outputs at most.
        rounded: The same with weights rounded: to nearest before, as they are in the end after.
        gain: Mean factor that gave its outputs their spread back.
    """

    # Ranges of the unit were in force while it was fitted to them; they are not observed again.
    moves_ranges: ClassVar[bool] = False

    refitted: str
    kind: str
    damping: float | None
    change: float
    error: tuple[float, float]
    rounded: tuple[float, float]
    gain: float = 1.0


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
) -> tuple[list[RefitReport], dict[str, Spread]]:
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
        One report a layer, and how its outputs spread in the float model.
    """
    layers: dict[str, QuantizedLayer] = {name: model.get_submodule(name) for name in passes.layers}
    reports, spreads = [], {}
    for group in grouped(passes.layers, together):
        exact = {name: floating.pop(name) for name in group}
        gathered = _gather(group, passes, exact, weights)
        for name in group:
            report, spreads[name] = _refit_layer(
                name, layers[name], gathered[name], settings, feedback, weight_observer
            )
            reports.append(report)
    return reports, spreads


class _Moments:
    """Of one layer: items that it is fitted to and those that judge, its outputs in the float model, and all quantized
    rows alike where the others are weighed.

    Args:
        weight: Of the layer in the float model, (groups, d, out).
    """

    def __init__(self, weight: Tensor):
        self.fit, self.judge, self.outputs = LayerMoments(), LayerMoments(), OutputSums()
        self.weight = weight
        self._alike: Tensor | None = None

    def update(self, index: int, rounded: Tensor, exact: Tensor, weights: Tensor | None) -> None:
        """Adds an item's rows (groups, rows, d); their weights are (1, rows, 1), None for all alike."""
        outputs = exact @ self.weight
        self.outputs.update(outputs)
        if weights is not None:
            gram = (rounded.transpose(-2, -1) @ rounded).double()
            self._alike = gram if self._alike is None else self._alike.add_(gram)
            root = weights.to(exact).sqrt()
            rounded, exact, outputs = rounded * root, exact * root, outputs * root
        (self.judge if index % HELD_OUT == HELD_OUT - 1 else self.fit).update(rounded, exact, outputs)

    @property
    def all(self) -> LayerMoments:
        """Of both."""
        return self.fit + self.judge

    def alike(self, moments: LayerMoments) -> Tensor:
        """Σ X̂ᵀX̂ over rows that count alike, (groups, d, d); ``moments`` are :attr:`all`."""
        return moments.gram if self._alike is None else self._alike


def _gather(
    names: Sequence[str], passes: QuantizedPasses, floating: dict[str, list[Tensor]], weights: RowWeights
) -> dict[str, _Moments]:
    """Moments of layers' inputs.

    Args:
        names: Layers in the order of execution; none reads what another gives.
        passes: Passes that reach them.
        floating: Rows of their inputs in the float model, item by item.
        weights: Of the squared errors of a layer's rows on an item.
    """
    moments = {name: _Moments(matrix(passes.model.get_submodule(name))) for name in names}
    for index, rows in enumerate(passes.rows(names)):
        for name in names:
            moments[name].update(index, rows[name], floating[name][index], weights_of_rows(weights, name, index))
    return moments


def _refit_layer(
    name: str,
    layer: QuantizedLayer,
    gathered: _Moments,
    settings: RefitSettings,
    feedback: bool,
    weight_observer: str,
) -> tuple[RefitReport, Spread]:
    ones, weight = layer.bias is not None, gathered.weight.double()
    moments = gathered.all
    alike = gathered.alike(moments)
    wanted = gathered.outputs.spread(ones=ones)
    some = _some(weight)
    objective = Objective(weight[..., some], moments.of(some))

    def rounded_error() -> float:
        with simulate(weights=True):
            simulated = layer.simulated_weight()
        found = matrix(layer).double()
        inputs = simulated.flatten(1).unflatten(0, (len(found), -1)).transpose(1, 2)
        found[:, : inputs.shape[1]] = inputs
        return objective.error(found[..., some])

    before = objective.error(weight[..., some]), rounded_error()
    kind, damping = _choose(weight, gathered.fit, gathered.judge, ones, settings)
    fitted = _fitted(weight, moments, ones, kind, damping)
    if kind != NONE:
        set_matrix(layer, fitted)
        layer.fit_weight(weight_observer)
    after = objective.error(fitted[..., some])
    if feedback and layer.weight_bits < 16:
        set_matrix(layer, _rounded(layer, fitted, moments, ones))
    gain = 1.0
    if settings.spread and settings.weights:
        found = Spread.of(matrix(layer), alike, gathered.outputs.count, ones=ones)
        gain = restore(layer, found, wanted, settings.spread)
    change = ((fitted - weight).norm() / weight.norm().clamp(min=1e-30)).item()
    report = RefitReport(name, kind, damping, change, (before[0], after), (before[1], rounded_error()), gain)
    return report, wanted


def _some(weight: Tensor) -> slice:
    """Outputs of a layer that its errors are told from: each costs a product for every pair of inputs."""
    return slice(None, None, odd_step_within(weight.shape[-1], CHANNELS))


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
    some = _some(weight)
    weight, fit, judge = weight[..., some], fit.of(some), judge.of(some)
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
