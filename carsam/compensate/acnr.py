"""ACNR, Activation-aware Condition Number Reduction (AHCQ-SAM, arXiv 2503.03088 v4): small singular values are raised.

A layer whose largest singular value is hundreds of times its smallest passes errors of its input on very unevenly. ACNR
pulls the small singular values towards the mean of all, less where the error of the input lies along them:

    min ½ (σ' − σ)² + λ (σ' − t)² + β C σ'²    for each value,    C = mean (ΔX u)²,  t = mean σ

This changes what the layer computes in floating point. The float targets do not follow, so learned rounding has to make
up for it; :class:`AcnrReport` says how far each layer moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from carsam.errors import ConfigError
from carsam.quantizers import QuantizedLayer, simulate

# Below this share of the largest a singular value counts as zero: condition numbers stay finite.
LEAST = 1e-12


@dataclass(frozen=True)
class AcnrSettings:
    """Settings of Activation-aware Condition Number Reduction; the defaults are the paper's.

    Attributes:
        enabled: Whether it runs.
        condition: Layers with a condition number below it are left alone.
        iterations: Proximal steps.
        pull: λ, towards the mean of the singular values.
        error_weight: β, of the input's quantization error.
        energy: Share of Σ σ² whose values stay as they are, and so does the one that passes it.
    """

    enabled: bool = True
    condition: float = 100.0
    iterations: int = 200
    pull: float = 0.003
    error_weight: float = 0.001
    energy: float = 0.8

    def __post_init__(self):
        if self.condition < 1:
            raise ConfigError(f"the condition of ACNR must be at least 1, not {self.condition:g}: no layer has less.")
        if not 0 <= self.iterations <= 100_000:
            raise ConfigError(f"the iterations of ACNR must lie in 0 to 100000, not {self.iterations}.")
        if self.pull < 0 or self.error_weight < 0:
            raise ConfigError("pull and error_weight of ACNR must not be negative.")
        if not 0 <= self.energy <= 1:
            raise ConfigError(f"the energy of ACNR must lie in 0 to 1, not {self.energy:g}.")


@dataclass
class AcnrReport:
    """What became of one layer.

    Attributes:
        layer: Its module path.
        condition: Condition number before and after.
        change: ‖D‖ / ‖W‖.
        error: ‖X̂ Ŵ − X W‖² / ‖X W‖² with the old and with the new weights, W the old ones; weights not quantized.
    """

    layer: str
    condition: tuple[float, float]
    change: float
    error: tuple[float, float]


def condition_number(weight: Tensor) -> float:
    """Largest over smallest singular value of a matrix (out, in); 1 where all are zero."""
    return _condition(torch.linalg.svdvals(weight.double()))


def _condition(values: Tensor) -> float:
    """Condition number of singular values in any order."""
    top = values.max()
    return (top / values.min().clamp(min=LEAST * top)).item() if top > 0 else 1.0


def raise_singular_values(values: Tensor, error: Tensor, settings: AcnrSettings) -> Tensor:
    """The iteration on the singular values alone: the singular vectors stay as they are.

    Args:
        values: (r,) σ.
        error: (r,) C, the mean squared error of the input along each left singular vector of Wᵀ.
        settings: Of the iteration.

    Returns:
        (r,) raised values, in the order of ``values``; none is smaller than it was.
    """
    values = values.clone()
    for _ in range(settings.iterations):
        order = values.argsort(descending=True, stable=True)
        energy = values[order].square().cumsum(0)
        # Values before the share is passed, and the one that passes it, are the layer's main directions.
        kept = int((energy <= settings.energy * energy[-1]).sum()) + 1
        behind = order[kept:]
        pulled = values[behind] + 2 * settings.pull * values.mean()
        pulled /= 1 + 2 * settings.pull + 2 * settings.error_weight * error[behind]
        values[behind] = torch.maximum(values[behind], pulled)
    return values


def reduce_condition(weight: Tensor, error_moments: Tensor, settings: AcnrSettings) -> tuple[Tensor, float, float]:
    """ACNR on one weight.

    Args:
        weight: W (out, in), of a layer y = x Wᵀ.
        error_moments: (in, in), mean of ΔXᵀΔX over tokens, ΔX the error of the quantized input.
        settings: Of the iteration.

    Returns:
        The new weight (out, in) in the precision of the old one, and the condition numbers before and after. A weight
        whose condition number is below ``settings.condition`` comes back as it is.
    """
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    before = _condition(values)
    if before < settings.condition:
        return weight, before, before
    error = ((right @ error_moments.double()) * right).sum(1)
    raised = raise_singular_values(values, error, settings)
    # W + D instead of the product of all factors: what is not raised stays exactly what it was.
    change = (left * (raised - values)) @ right
    return weight + change.to(weight.dtype), before, _condition(raised)


@dataclass
class _Moments:
    """Second moments of a layer's float input X and of the error ΔX = X − X̂, means over tokens, (in, in) each."""

    inputs: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    error: Tensor | float = 0.0
    tokens: int = field(default=0)

    def update(self, exact: Tensor, quantized: Tensor) -> None:
        """Takes one pass: (..., in) each."""
        exact, quantized = exact.flatten(0, -2), quantized.flatten(0, -2)
        error = exact - quantized
        self.tokens += len(exact)
        share = len(exact) / self.tokens
        pairs = {"inputs": (exact, exact), "cross": (exact, error), "error": (error, error)}
        for name, (a, b) in pairs.items():
            mean = getattr(self, name)
            setattr(self, name, mean + share * (a.T @ b / len(exact) - mean))

    def output_error(self, old: Tensor, new: Tensor) -> float:
        """‖X̂ Ŵᵀ − X Wᵀ‖² / ‖X Wᵀ‖² for an old and a new weight (out, in)."""
        # X̂ Ŵᵀ − X Wᵀ = X Dᵀ − ΔX Ŵᵀ, D = Ŵ − W.
        old, new = old.double(), new.double()
        inputs, cross, error = (part.double() for part in (self.inputs, self.cross, self.error))
        change = new - old
        total = ((change @ inputs) * change).sum() - 2 * ((change @ cross) * new).sum() + ((new @ error) * new).sum()
        energy = ((old @ inputs) * old).sum().clamp(min=1e-30)
        return max(0.0, (total / energy).item())


@contextmanager
def _seen_inputs(layers: dict[str, QuantizedLayer]) -> Iterator[dict[str, Tensor]]:
    """What layers multiply with their weights in the passes of a ``with`` block; the last pass counts."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.input_quantizer.register_forward_hook(lambda _m, _a, out, name=name: seen.update({name: out}))
        for name, layer in layers.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def compensate_layers(
    model: nn.Module,
    names: list[str],
    passes: list[tuple[Callable[[], object], Callable[[], object]]],
    settings: AcnrSettings,
    *,
    weight_observer: str = "mse",
) -> list[AcnrReport]:
    """ACNR on the ill-conditioned Linear layers among some layers; the grids of their weights are fitted again.

    The error of an input is measured for all layers in the same passes, before any of them changes. It holds what
    activation quantizers in front of the layer add and what earlier units have left, not the rounding of weights here.

    Args:
        model: Model with quantized layers, ranges set, these weights in floating point.
        names: Paths of quantized layers.
        passes: For each calibration item, what runs the layers from the float model's inputs and what runs them from
            the inputs of the model quantized so far.
        settings: Of the iteration.
        weight_observer: For the grids that are fitted again.

    Returns:
        A report for each layer that was changed.
    """
    layers = {name: model.get_submodule(name) for name in names}
    layers = {
        name: layer
        for name, layer in layers.items()
        if layer.conv is None
        and max(layer.weight_bits, layer.input_quantizer.bits) < 16
        and condition_number(layer.weight) >= settings.condition
    }
    if not layers:
        return []
    moments = {name: _Moments() for name in layers}
    for floating, quantized in passes:
        with _seen_inputs(layers) as exact, simulate(weights=False, activations=False):
            floating()
        with _seen_inputs(layers) as simulated, simulate(weights=False, activations=True, drop=0.0):
            quantized()
        for name, found in moments.items():
            found.update(exact[name], simulated[name])
    reports = []
    for name, layer in layers.items():
        found, old = moments[name], layer.weight.detach().clone()
        new, before, after = reduce_condition(old, found.error, settings)
        layer.weight.copy_(new)
        layer.fit_weight(weight_observer)
        change = ((new - old).norm() / old.norm()).item()
        errors = found.output_error(old, old), found.output_error(old, new)
        reports.append(AcnrReport(name, (before, after), change, errors))
    return reports
