"""MAC applied to an attention: gather statistics on the quantized-so-far model, solve, change the projections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carsam.calibrate.capture import capture_call
from carsam.calibrate.observers import RangeRecorder
from carsam.compensate.closed_form import (
    SOLVERS,
    ProductStatistics,
    ValueStatistics,
    choose_damping,
    compensate_product,
    compensate_value,
)
from carsam.errors import ConfigError
from carsam.models.family import family_of
from carsam.models.rotation import Rotation
from carsam.models.sites import AttentionSite
from carsam.quantizers import QuantizedLayer, simulate

OPERANDS = ("query", "key", "value")


@dataclass(frozen=True)
class MacSettings:
    """Settings of MatMul-Aware Compensation.

    Attributes:
        query, key, value: Which branches run. Value is off by default: it answers the mass that coarse codes of P lose,
            which learning their step answers as well, and both together overshoot (docs/RESULTS.md). Without
            reconstruction it helps.
        solver: ``exact`` (conjugate gradients) or ``pooled`` (the paper's Sylvester equation).
        damping: λ of the query and key branches, relative to the mean diagonals of the second moments; None chooses it
            for each attention and branch by held-out calibration items. Small values overfit: prompt tokens span few
            directions, and along the others nothing holds D back. On held-out images 1 is best or close to it at every
            attention of the embedded model, and 0.01 is often worse than no compensation (docs/RESULTS.md).
        value_damping: λ of the value branch, likewise.
        center_keys: Count score errors after each row's mean is removed, which softmax ignores anyway.
        order: ``joint`` solves for query and key from the same statistics and applies both; ``sequential`` solves for
            the query, fits and observes again, then solves for the key with what is left.
        targets: ``quantized`` asks for the scores that float projections give at the inputs as they come, errors from
            upstream included; ``float`` asks for those of the float model (GPTAQ's asymmetric form).
    """

    query: bool = True
    key: bool = True
    value: bool = False
    solver: str = "exact"
    damping: float | None = 1.0
    value_damping: float = 1.0
    center_keys: bool = True
    order: str = "joint"
    targets: str = "quantized"

    def __post_init__(self):
        choices = (("solver", SOLVERS), ("order", ("joint", "sequential")), ("targets", ("quantized", "float")))
        for setting, allowed in choices:
            value = getattr(self, setting)
            if value not in allowed:
                raise ConfigError(f"unknown MAC {setting} {value!r}; choose from {', '.join(allowed)}.")
        if (self.damping is not None and self.damping <= 0) or self.value_damping <= 0:
            raise ConfigError("the damping of MAC must be positive: its equations are singular without it.")

    @property
    def enabled(self) -> bool:
        """Whether any branch runs."""
        return self.query or self.key or self.value


OFF = MacSettings(query=False, key=False, value=False)


@dataclass
class MacReport:
    """Relative errors of one attention before and after, all on the calibration set with everything quantized.

    Attributes:
        attention: Its module path.
        scores: Squared error of QKᵀ (row means removed) relative to its variance, before and after.
        output: Squared error of PV relative to its energy, before and after.
        change: ‖D‖ / ‖W‖ of the branches that ran.
        damping: λ of the query and key branches where held-out items chose it; 0 for a branch that every λ made worse,
            which then is left as it was.
    """

    attention: str
    scores: tuple[float, float] = (0.0, 0.0)
    output: tuple[float, float] = (0.0, 0.0)
    change: dict[str, float] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Coupled:
    """An attention that is called with ``query``, ``key`` and ``value``, and its projections.

    Attributes:
        name: Module path.
        module: The attention; its ``matmul`` quantizes the MatMuls' inputs.
        layers: The projections by ``query``, ``key``, ``value``.
        heads: Number of heads.
        scaling: Factor of the scores.
        rotations: Tells from the arguments of a call how queries and keys are turned before their product; None where
            they are not.
    """

    name: str
    module: nn.Module
    layers: dict[str, nn.Module]
    heads: int
    scaling: float
    rotations: Callable[[Mapping[str, Any]], tuple[Rotation, Rotation]] | None = None

    @classmethod
    def of(cls, model: nn.Module, site: AttentionSite) -> Coupled:
        """A coupled attention site of a model."""
        assert site.coupled, f"{site.name} reads one tensor"
        module = model.get_submodule(site.name)
        layers = {which: model.get_submodule(getattr(site, which).layer) for which in OPERANDS}
        rotations = family_of(model).rotations if site.rotary else None
        return cls(site.name, module, layers, module.num_attention_heads, module.scaling, rotations)

    def turned(self, query: Tensor, key: Tensor, call: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Projected queries and keys, (n, heads, tokens, d_head) each, as their product reads them."""
        if self.rotations is None:
            return query, key
        queries, keys = self.rotations(call)
        return queries.turn(query), keys.turn(key)

    def matrices(self) -> list[Tensor]:
        """Query, key and value projection per head, (heads, d_in + 1, d_head) each; copies."""
        return [projection_matrix(layer, self.heads).clone() for layer in self.layers.values()]


@dataclass
class _Operands:
    """One attention's MatMul inputs on one item: (n, heads, tokens, d_head) each, and the attention."""

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    probs: Tensor


def with_ones(inputs: Tensor) -> Tensor:
    """(n, 1, tokens, d) attention inputs to (n, tokens, d + 1), so that the bias is the last row of W."""
    return F.pad(inputs.flatten(0, 1), (0, 1), value=1.0)


def split_heads(values: Tensor, heads: int) -> Tensor:
    """(n, 1, tokens, heads · d_head) to (n, heads, tokens, d_head)."""
    return values.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)


def projection_matrix(layer: QuantizedLayer, heads: int) -> Tensor:
    """(heads, d_in + 1, d_head): the projection per head with its bias as last row."""
    weight = layer.weight.detach().unflatten(0, (heads, -1)).transpose(1, 2)
    return torch.cat([weight, layer.bias.detach().view(heads, 1, -1)], dim=1)


@torch.no_grad()
def add_to_projection(layer: QuantizedLayer, change: Tensor) -> float:
    """W ← W + D and b with it; returns ‖D‖ / ‖W‖.

    Args:
        layer: Projection with float weights and a bias.
        change: (heads, d_in + 1, d_head).
    """
    size = layer.weight.norm()
    change = change.to(layer.weight.dtype)
    layer.weight.add_(change[:, :-1].transpose(1, 2).flatten(0, 1))
    layer.bias.add_(change[:, -1].flatten())
    return (change.norm() / size).item()


def _operands(attention: Coupled, call: Mapping[str, Any], reference: list[Tensor] | None = None) -> _Operands:
    """MatMul inputs as the simulation has them; with ``reference`` projections (W per head), in floating point."""
    heads = attention.heads
    if reference is not None:
        inputs = (call["query"], call["key"], call["value"])
        q, k, v = (with_ones(x)[:, None] @ w for x, w in zip(inputs, reference))
        q, k = attention.turned(q, k, call)
        scores = q @ k.transpose(-2, -1) * attention.scaling
        return _Operands(q, k, v, scores, torch.softmax(scores, -1))
    matmul = attention.module.matmul
    q, k, v = (split_heads(layer(call[which]), heads) for which, layer in attention.layers.items())
    q, k = attention.turned(q, k, call)
    q, k, v = matmul.query(q), matmul.key(k), matmul.value(v)
    scores = q @ k.transpose(-2, -1) * attention.scaling
    return _Operands(q, k, v, scores, matmul.probs(scores))


def attention_calls(
    attention: Coupled, runs: Iterable[Callable[[], object]], *, quantized: bool = True
) -> Iterator[dict[str, Any]]:
    """Arguments of the attention for every calibration item.

    Args:
        attention: The attention.
        runs: Run the network up to it, item by item.
        quantized: From the quantized-so-far model; otherwise nothing is quantized on the way.
    """
    for run in runs:
        with torch.no_grad(), simulate(weights=quantized, activations=quantized, drop=0.0):
            _, call = capture_call(attention.module, run)
        # Positions, where there are some, are among the others.
        yield call if attention.rotations else {name: call[name] for name in OPERANDS}


class _Errors:
    """Relative squared errors of centred scores and of PV, summed over calibration items."""

    def __init__(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)

    def update(self, exact: _Operands, quantized: _Operands) -> None:
        """Takes one item, in floating point and with everything quantized."""
        want = exact.scores - exact.scores.mean(-1, keepdim=True)
        got = quantized.scores - quantized.scores.mean(-1, keepdim=True)
        out, out_hat = exact.probs @ exact.value, quantized.probs @ quantized.value
        parts = [(got - want).square().sum(), want.square().sum(), (out_hat - out).square().sum(), out.square().sum()]
        self._sums += torch.stack(parts).double().cpu()

    def relative(self) -> tuple[float, float]:
        """Of the scores and of the output."""
        s = self._sums.clamp(min=1e-30)
        return (s[0] / s[1]).item(), (s[2] / s[3]).item()


def attention_errors(
    attention: Coupled, calls: Iterable[dict[str, Any]], reference: list[Tensor]
) -> tuple[float, float]:
    """Relative squared errors of an attention's scores and output against float projections.

    Args:
        attention: Quantized decoder attention.
        calls: Its inputs, item by item.
        reference: Float projections of query, key and value, (heads, d_in + 1, d_head) each.
    """
    errors = _Errors()
    for call in calls:
        exact = _operands(attention, call, reference)
        with simulate(weights=True, activations=True, drop=0.0):
            errors.update(exact, _operands(attention, call))
    return errors.relative()


@dataclass
class _Item:
    """One calibration item at an attention.

    Attributes:
        inputs: What the attention is called with in the quantized-so-far model.
        floating: What the targets are computed from: the same, or the inputs in the float model.
        exact: MatMul operands by float projections, from ``floating``.
        quantized: From ``inputs``, everything quantized.
    """

    inputs: dict[str, Any]
    floating: dict[str, Any]
    exact: _Operands
    quantized: _Operands


@torch.no_grad()
def compensate_attention(
    attention: Coupled,
    runs: list[Callable[[], object]],
    settings: MacSettings,
    *,
    weight_observer: str = "mse",
    activation_observer: str = "mse",
    floating: list[dict[str, Any]] | None = None,
) -> MacReport:
    """Compensates the query, key and value projections of one attention (METHOD.md, 7).

    D_Q answers the error of K̂ and D_K the error of Q̂. Then weight grids are fitted and ranges observed again, and D_V
    answers what is left in P̂.

    Args:
        attention: An attention with quantized projections and MatMuls, ranges set.
        runs: One callable per calibration item that runs the network up to the attention.
        settings: Which branches, and how.
        weight_observer, activation_observer: For the grids that are fitted again after a projection changed.
        floating: Inputs of the attention in the float model, item by item, for ``targets="float"``.

    Returns:
        Errors before and after.
    """
    task = _Compensation(
        attention, list(attention_calls(attention, runs)), floating, settings, weight_observer, activation_observer
    )
    return task.run()


class _Compensation:
    """MAC at one attention, see :func:`compensate_attention`."""

    def __init__(
        self,
        attention: Coupled,
        calls: list[dict[str, Any]],
        floating: list[dict[str, Any]] | None,
        settings: MacSettings,
        weight_observer: str,
        activation_observer: str,
    ):
        assert settings.targets == "quantized" or floating is not None, "float targets need float inputs"
        self.attention, self.calls, self.settings = attention, calls, settings
        self.float_targets = settings.targets == "float"
        self.floating = floating if self.float_targets else calls
        self.observers = weight_observer, activation_observer
        self.original = attention.matrices()
        self.report = MacReport(attention.name)

    def run(self) -> MacReport:
        settings, report = self.settings, self.report
        before = self._errors()
        branches = [which for which in ("query", "key") if getattr(settings, which)]
        steps = [branches] if settings.order == "joint" else [[which] for which in branches]
        for step in filter(None, steps):
            changes = self._product_changes(step, after_other=bool(report.change))
            for which, change in changes.items():
                report.change[which] = add_to_projection(self.attention.layers[which], change)
            self._refit()
        if settings.value:
            change = self._value_change()
            report.change["value"] = add_to_projection(self.attention.layers["value"], change)
            self._refit()
        after = self._errors()
        report.scores, report.output = (before[0], after[0]), (before[1], after[1])
        return report

    def _items(self) -> Iterator[_Item]:
        for inputs, floating in zip(self.calls, self.floating, strict=True):
            exact = _operands(self.attention, floating, self.original)
            with simulate(weights=True, activations=True, drop=0.0):
                quantized = _operands(self.attention, inputs)
            yield _Item(inputs, floating, exact, quantized)

    def _errors(self) -> tuple[float, float]:
        errors = _Errors()
        for item in self._items():
            errors.update(item.exact, item.quantized)
        return errors.relative()

    def _product_changes(self, branches: list[str], *, after_other: bool) -> dict[str, Tensor]:
        """D of the query and key branches named, all from the model as it is now.

        Args:
            branches: ``query``, ``key`` or both.
            after_other: The other branch was compensated already, for the error that this one's operand has quantized.
        """
        statistics = {which: ProductStatistics() for which in branches}
        for item in self._items():
            for which in branches:
                other = "key" if which == "query" else "query"
                inputs, floating = (self._projected(each[which], which) for each in (item.inputs, item.floating))
                rotation = self._rotation(item, which)
                own = getattr(item.quantized, which) if after_other else None
                statistics[which].update(
                    inputs,
                    getattr(item.exact, other),
                    getattr(item.quantized, other),
                    center=self.settings.center_keys and which == "query",
                    float_inputs=floating if self.float_targets or after_other else None,
                    own=own if own is None or rotation is None else rotation.turn_back(own),
                    rotation=rotation,
                )
        return {which: self._product_change(which, each) for which, each in statistics.items()}

    def _rotation(self, item: _Item, which: str) -> Rotation | None:
        """How the operand of a branch is turned; on both sides of the target, for frames of one size."""
        if self.attention.rotations is None:
            return None
        queries, keys = self.attention.rotations(item.inputs)
        return queries if which == "query" else keys

    def _projected(self, inputs: Tensor, which: str) -> Tensor:
        """Inputs of a projection with the column of ones; of the key's, what softmax ignores is taken out.

        Keys that are turned keep it: what they share before is not what they share afterwards.
        """
        inputs = with_ones(inputs)
        if which == "key" and self.settings.center_keys and self.attention.rotations is None:
            inputs = inputs - inputs.mean(-2, keepdim=True)
        return inputs

    def _product_change(self, which: str, statistics: ProductStatistics) -> Tensor:
        weight, solver = self.original[OPERANDS.index(which)], self.settings.solver
        relative = self.settings.damping
        if relative is None:
            relative = choose_damping(weight, statistics, solver=solver)
            self.report.damping[which] = relative or 0.0
            if relative is None:
                return torch.zeros_like(weight)
        return compensate_product(weight, statistics, solver=solver, relative_damping=relative)

    def _value_change(self) -> Tensor:
        statistics = ValueStatistics()
        for item in self._items():
            inputs, exact = with_ones(item.inputs["value"]), item.exact
            if self.float_targets:
                value = inputs[:, None] @ self.original[OPERANDS.index("value")]
                statistics.update(inputs, exact.probs, item.quantized.probs, value, target=exact.probs @ exact.value)
            else:
                statistics.update(inputs, exact.probs, item.quantized.probs, exact.value)
        return compensate_value(statistics, relative_damping=self.settings.value_damping)

    def _refit(self) -> None:
        """Fits weight grids and observes the attention's ranges again, on its own inputs alone."""
        weight_observer, activation_observer = self.observers
        for layer in self.attention.layers.values():
            layer.fit_weight(weight_observer)
        recorder = RangeRecorder([self.attention.module])
        with recorder.recording(), simulate(weights=True, activations=False):
            for call in self.calls:
                self.attention.module(**call)
        recorder.apply(activation_observer)
