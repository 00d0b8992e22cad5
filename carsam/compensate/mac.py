"""MAC applied to an attention: gather statistics on the quantized-so-far model, solve, change the projections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carsam.calibrate.capture import capture_call
from carsam.calibrate.observers import RangeRecorder
from carsam.compensate.closed_form import (
    SOLVERS,
    ProductStatistics,
    ValueStatistics,
    compensate_product,
    compensate_value,
)
from carsam.errors import ConfigError
from carsam.models.sites import AttentionSite
from carsam.quantizers import QuantizedLayer, simulate


@dataclass(frozen=True)
class MacSettings:
    """Settings of MatMul-Aware Compensation.

    Attributes:
        query, key, value: Which branches run. Value is off by default: it answers the mass that coarse codes of P lose,
            which learning their step answers as well, and both together overshoot (docs/RESULTS.md). Without
            reconstruction it helps.
        solver: ``exact`` (conjugate gradients) or ``pooled`` (the paper's Sylvester equation).
        damping: λ of the query and key branches, relative to the mean diagonals of the second moments. Small values
            overfit: prompt tokens span few directions, and along the others nothing holds D back. On held-out images
            1 is best or close to it at every attention, and 0.01 is often worse than no compensation
            (docs/RESULTS.md).
        value_damping: λ of the value branch, likewise.
        center_keys: Count score errors after each row's mean is removed, which softmax ignores anyway.
    """

    query: bool = True
    key: bool = True
    value: bool = False
    solver: str = "exact"
    damping: float = 1.0
    value_damping: float = 1.0
    center_keys: bool = True

    def __post_init__(self):
        if self.solver not in SOLVERS:
            raise ConfigError(f"unknown MAC solver {self.solver!r}; choose from {', '.join(SOLVERS)}.")
        if self.damping <= 0 or self.value_damping <= 0:
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
    """

    attention: str
    scores: tuple[float, float] = (0.0, 0.0)
    output: tuple[float, float] = (0.0, 0.0)
    change: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Coupled:
    """An attention that is called with ``query``, ``key`` and ``value``, and its projections.

    Attributes:
        name: Module path.
        module: The attention; its ``matmul`` quantizes the MatMuls' inputs.
        layers: The projections by ``query``, ``key``, ``value``.
        heads: Number of heads.
        scaling: Factor of the scores.
    """

    name: str
    module: nn.Module
    layers: dict[str, nn.Module]
    heads: int
    scaling: float

    @classmethod
    def of(cls, model: nn.Module, site: AttentionSite) -> Coupled:
        """A coupled attention site of a model."""
        assert site.coupled, f"{site.name} reads one tensor"
        module = model.get_submodule(site.name)
        layers = {which: model.get_submodule(getattr(site, which).layer) for which in ("query", "key", "value")}
        return cls(site.name, module, layers, module.num_attention_heads, module.scaling)

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


def _operands(attention: Coupled, call: dict[str, Tensor], reference: list[Tensor] | None = None) -> _Operands:
    """MatMul inputs as the simulation has them; with ``reference`` projections (W per head), in floating point."""
    heads = attention.heads
    if reference is not None:
        inputs = (call["query"], call["key"], call["value"])
        q, k, v = (with_ones(x)[:, None] @ w for x, w in zip(inputs, reference))
        scores = q @ k.transpose(-2, -1) * attention.scaling
        return _Operands(q, k, v, scores, torch.softmax(scores, -1))
    matmul = attention.module.matmul
    q, k, v = (
        getattr(matmul, which)(split_heads(layer(call[which]), heads)) for which, layer in attention.layers.items()
    )
    scores = q @ k.transpose(-2, -1) * attention.scaling
    return _Operands(q, k, v, scores, matmul.probs(scores))


def attention_calls(attention: Coupled, runs: Iterable[Callable[[], object]]) -> Iterator[dict[str, Tensor]]:
    """Inputs of the attention for every calibration item, from the quantized-so-far model."""
    for run in runs:
        with simulate(weights=True, activations=True, drop=0.0):
            _, call = capture_call(attention.module, run)
        yield {name: call[name] for name in ("query", "key", "value")}


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
    attention: Coupled, calls: Iterable[dict[str, Tensor]], reference: list[Tensor]
) -> tuple[float, float]:
    """Relative squared errors of an attention's scores and output against float projections.

    Args:
        attention: Quantized decoder attention.
        calls: Its inputs, item by item.
        reference: Float projections of query, key and value, (heads, d_in + 1, d_head) each.
    """
    errors = _Errors()
    for exact, quantized in _pairs(attention, calls, reference):
        errors.update(exact, quantized)
    return errors.relative()


def _pairs(
    attention: Coupled, calls: Iterable[dict[str, Tensor]], reference: list[Tensor]
) -> Iterator[tuple[_Operands, _Operands]]:
    """Operands of every item, in floating point by the reference and with everything quantized."""
    for call in calls:
        exact = _operands(attention, call, reference)
        with simulate(weights=True, activations=True, drop=0.0):
            quantized = _operands(attention, call)
        yield exact, quantized


@torch.no_grad()
def compensate_attention(
    attention: Coupled,
    runs: list[Callable[[], object]],
    settings: MacSettings,
    *,
    weight_observer: str = "mse",
    activation_observer: str = "mse",
) -> MacReport:
    """Compensates the query, key and value projections of one attention (METHOD.md, 7).

    D_Q answers the error of K̂ and D_K the error of Q̂; both come from the same statistics, each to first order, and
    are applied together. Then weight grids are fitted and ranges observed again, and D_V answers what is left in P̂.

    Args:
        attention: An attention with quantized projections and MatMuls, ranges set.
        runs: One callable per calibration item that runs the network up to the attention.
        settings: Which branches, and how.
        weight_observer, activation_observer: For the grids that are fitted again after a projection changed.

    Returns:
        Errors before and after.
    """
    layers, original = attention.layers, attention.matrices()
    calls = list(attention_calls(attention, runs))
    report = MacReport(attention.name)

    def refit() -> None:
        """Fits weight grids and observes the attention's ranges again, on its own inputs alone."""
        for layer in layers.values():
            layer.fit_weight(weight_observer)
        recorder = RangeRecorder([attention.module])
        with recorder.recording(), simulate(weights=True, activations=False):
            for call in calls:
                attention.module(**call)
        recorder.apply(activation_observer)

    for_query, for_key = ProductStatistics.empty(), ProductStatistics.empty()
    errors = _Errors()
    for call, (exact, quantized) in zip(calls, _pairs(attention, calls, original)):
        errors.update(exact, quantized)
        if settings.query:
            for_query.update(with_ones(call["query"]), exact.key, quantized.key, center=settings.center_keys)
        if settings.key:
            inputs = with_ones(call["key"])
            if settings.center_keys:
                inputs = inputs - inputs.mean(-2, keepdim=True)
            for_key.update(inputs, exact.query, quantized.query)
    before = errors.relative()

    if settings.query or settings.key:
        options = {"solver": settings.solver, "relative_damping": settings.damping}
        changes = {}
        if settings.query:
            changes["query"] = compensate_product(original[0], for_query, **options)
        if settings.key:
            changes["key"] = compensate_product(original[1], for_key, **options)
        for which, change in changes.items():
            report.change[which] = add_to_projection(layers[which], change)
        refit()

    if settings.value:
        statistics = ValueStatistics()
        for call, (exact, quantized) in zip(calls, _pairs(attention, calls, original)):
            statistics.update(with_ones(call["value"]), exact.probs, quantized.probs, exact.value)
        change = compensate_value(statistics, relative_damping=settings.value_damping)
        report.change["value"] = add_to_projection(layers["value"], change)
        refit()

    after = attention_errors(attention, calls, original)
    report.scores, report.output = (before[0], after[0]), (before[1], after[1])
    return report
