"""AdaRound's way through a unit (ICML 2020, arXiv 2004.10568): one layer at a time, from its own input and output."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from carsam.calibrate.cache import CacheSpace, cached, variances
from carsam.calibrate.capture import capture_call
from carsam.quantizers import QuantizedLayer, simulate
from carsam.reconstruct.optimize import ReconstructionSettings, UnitData, optimise
from carsam.reconstruct.units import Unit, run_unit


def optimise_layers(
    model: nn.Module,
    reference: nn.Module,
    unit: Unit,
    data: UnitData,
    settings: ReconstructionSettings,
    *,
    steps: int,
    seed: int,
    device: torch.device,
    space: CacheSpace,
    progress: Callable[[int], None] | None = None,
    learned: Callable[[nn.Module, Unit], None] | None = None,
) -> list[list[tuple[int, float]]]:
    """Learns the rounding of a unit's layers in execution order; each meets what the rounded ones before it give.

    Args:
        model: The model being quantized.
        reference: The float model: a layer's target is its output there.
        unit: The unit whose layers are learned.
        data: The unit's cached inputs.
        settings: Of the loop.
        steps: Steps of each layer.
        seed: Of the run.
        device: Where the unit runs.
        space: Budget of the caches.
        progress: Called with the share of the unit that is done, in steps of one layer.
        learned: Given model and layer when it is learned and not yet an integer.

    Returns:
        ``(step, loss)`` points of each layer; steps count on from layer to layer.
    """

    def run(of: nn.Module, index: int) -> None:
        inputs = data.quantized if of is model else data.floating
        with simulate(weights=of is model, activations=of is model, drop=0.0):
            run_unit(of, unit, inputs.get(index, device))

    indices = range(len(data.quantized))
    losses: list[list[tuple[int, float]]] = []
    layers = execution_order(model, unit, partial(run, model, 0))
    for number, name in enumerate(layers):
        layer, source = model.get_submodule(name), reference.get_submodule(name)

        def inputs_of(module: nn.Module, of: nn.Module, index: int) -> dict[str, torch.Tensor]:
            args, _ = capture_call(module, partial(run, of, index))
            return {"x": args[0]}

        inputs = cached(space, (inputs_of(layer, model, i) for i in indices))
        # The float input matters only where QDrop mixes it in.
        floating = cached(space, (inputs_of(source, reference, i) for i in indices)) if settings.drop > 0 else inputs
        targets = cached(
            space, ({"output_0": capture_call(source, partial(run, reference, i), output=True)} for i in indices)
        )
        alone = single_layer(name, unit.stage, channel_dim=-1 if layer.conv is None else 1)
        points = optimise(
            model,
            alone,
            UnitData(inputs, floating, targets, variances(targets)),
            settings,
            steps=steps,
            seed=seed,
            device=device,
            learned=learned,
            progress=None if progress is None else lambda step, n=number: progress((n * steps + step) // len(layers)),
        )
        losses.append([(number * steps + step, loss) for step, loss in points])
    return losses


def single_layer(name: str, stage: str, channel_dim: int) -> Unit:
    """One layer as a unit: its input ``x``, its output."""

    def run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"output": model.get_submodule(name)(**inputs)}

    def capture(model: nn.Module, run_stage: Callable[[], object]) -> dict[str, torch.Tensor]:
        args, _ = capture_call(model.get_submodule(name), run_stage)
        return {"x": args[0]}

    return Unit(name, (name,), stage, run, capture, channel_dim)


def execution_order(model: nn.Module, unit: Unit, run: Callable[[], None]) -> list[str]:
    """Paths of a unit's quantized layers in the order in which ``run()`` reaches them."""
    order: list[str] = []
    handles = []
    for path in unit.scope:
        for name, module in model.get_submodule(path).named_modules(prefix=path):
            if isinstance(module, QuantizedLayer):
                handles.append(module.register_forward_pre_hook(lambda _module, _args, name=name: order.append(name)))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return order
