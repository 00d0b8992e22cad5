"""Passes over a unit for the refit: what its layers read in the float model, and in the model quantized so far.

A pass costs as much as the unit, and the refit asks for one behind another. Two things save passes: rows of the float
model are kept from the pass that gives the unit's targets, and what is finished within the unit (the attention of a
transformer block, while its MLP is fitted) is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carsam.calibrate.capture import capture_call
from carsam.calibrate.sensitivity import RowWeights, sampled_rows
from carsam.quantizers import QuantizedLayer, simulate
from carsam.quantizers.layers import convolution
from carsam.quantizers.sampling import odd_step_within, sampled_patches

# Rows of a layer's input that one calibration item gives: they differ far more between images than within one.
ROWS = 1024
# Inputs of a finished module's last layer that are kept at most, in bytes.
KEPT_BYTES = 2**30


def rows_of(layer: nn.Module, x: Tensor, most: int) -> Tensor:
    """What some of every group's outputs are computed from, (groups, rows, d): tokens, or patches under a kernel."""
    conv = layer.conv if isinstance(layer, QuantizedLayer) else convolution(layer)
    if conv is None:
        flat = x.flatten(0, -2)[None]
        return flat[:, :: odd_step_within(flat.shape[1], most)]
    return sampled_patches(x, tuple(layer.weight.shape[-2:]), **conv, most=most)


def fitted_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """:func:`rows_of`, the same ones for inputs of one shape; with a column of ones where there is a bias."""
    found = rows_of(layer, x.detach(), ROWS)
    return F.pad(found, (0, 1), value=1.0) if layer.bias is not None else found.clone()


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


def weights_of_rows(weights: RowWeights, name: str, index: int) -> Tensor | None:
    """Weights of the rows that :func:`fitted_rows` gives of a layer's input on an item, (1, rows, 1); None for all
    alike."""
    own = weights(name, index)
    return None if own is None else sampled_rows(own, ROWS)[None, :, None]


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


class FloatRows:
    """Rows of layers' inputs in the float model, item by item, seen while it passes over a unit.

    Args:
        model: The float model.
        layers: Module paths.
        items: Items that are kept; later ones are not.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], items: int):
        self.model, self.layers, self.items = model, layers, items
        # In the order in which the pass reaches the layers.
        self.rows: dict[str, list[Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the block runs, passes of the float model are seen."""

        def see(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = self.rows.setdefault(name, [])
            if len(rows) < self.items:
                rows.append(fitted_rows(module, args[0]))

        with ExitStack() as hooks:
            for name in self.layers:
                handle = self.model.get_submodule(name).register_forward_pre_hook(partial(see, name))
                hooks.callback(handle.remove)
            yield


class QuantizedPasses:
    """Passes over a unit of the model quantized so far, each as far as a layer and no further.

    Args:
        model: The model being quantized.
        layers: Module paths of the unit's layers, in the order of execution. They are fitted in this order.
        runs: Run the unit, one callable an item.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], runs: Sequence[Callable[[], object]]):
        self.model, self.layers, self.runs = model, layers, runs
        self._done: set[str] = set()
        self._finished: list[_Finished] = []
        self._room = KEPT_BYTES

    def inputs(self, group: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Inputs of some layers, which stand behind one another and read nothing of each other, item by item.

        All layers before them must be fitted, for good.
        """
        *before, last = group
        self._done.update(group)
        path = self._ends(last)
        finishing = None if path is None else _Finished(self.model, path, last)
        for index, run in enumerate(self.runs):
            seen: dict[str, Tensor] = {}
            with ExitStack() as stack, simulate(weights=True, activations=True, drop=0.0):
                stack.enter_context(self.left_out(index))
                for name in before:
                    keep = partial(_keep, seen, name)
                    stack.callback(self.model.get_submodule(name).register_forward_pre_hook(keep).remove)
                args, _ = capture_call(self.model.get_submodule(last), run)
            seen[last] = args[0]
            if finishing is not None:
                finishing.inputs.append(args[0])
                if finishing.bytes * len(self.runs) > self._room * len(finishing.inputs):
                    finishing = None
            yield seen
        self._finished = [each for each in self._finished if each.usable]
        if finishing is not None:
            self._room -= finishing.bytes
            self._finished.append(finishing)

    def rows(self, group: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """As :meth:`inputs`, quantized, as rows that layers are fitted to."""
        layers: dict[str, QuantizedLayer] = {name: self.model.get_submodule(name) for name in group}
        for seen in self.inputs(group):
            with simulate(weights=True, activations=True, drop=0.0):
                found = {name: fitted_rows(layer, layer.input_quantizer(seen[name])) for name, layer in layers.items()}
            yield found

    @contextmanager
    def left_out(self, index: int) -> Iterator[None]:
        """While the block runs the unit on an item, finished modules are not computed again.

        Layers must be as they were fitted, integers or about to become them.
        """
        with ExitStack() as stack:
            for finished in self._finished:
                stack.enter_context(finished.left_out(index))
            yield

    def _ends(self, last: str) -> str | None:
        """The largest module whose layers are all fitted once ``last`` is; None where that is ``last`` or the unit."""
        found, path = None, last
        while "." in path:
            path = path.rpartition(".")[0]
            within = [name for name in self.layers if name.startswith(path + ".")]
            if not self._done.issuperset(within) or len(within) == len(self.layers):
                break
            if len(within) > 1:
                found = path
        return found


class _Finished:
    """A module whose layers are fitted, left out of further passes where it gives what its last layer gives.

    Whether it does shows in the first pass behind it, which computes all of it.
    """

    def __init__(self, model: nn.Module, path: str, last: str):
        self.module, self.layer = model.get_submodule(path), model.get_submodule(last)
        self.inputs: list[Tensor] = []
        self.usable, self._known = True, False
        # Of its output: None where that is the layer's, else the length of a tuple that the layer's output begins.
        self._length: int | None = None

    @property
    def bytes(self) -> int:
        """Memory of what is kept."""
        return sum(each.nbytes for each in self.inputs)

    @contextmanager
    def left_out(self, index: int) -> Iterator[None]:
        """While the block runs the unit on an item, the layer alone is computed."""
        if not self.usable or index >= len(self.inputs):
            yield
        elif not self._known:
            with self._looking():
                yield
        else:
            own = self.module.__dict__.get("forward")
            self.module.forward = lambda *_args, **_kwargs: self._result(index)
            try:
                yield
            finally:
                if own is None:
                    del self.module.forward
                else:
                    self.module.forward = own

    def _result(self, index: int) -> Any:
        output = self.layer(self.inputs[index])
        return output if self._length is None else (output, *[None] * (self._length - 1))

    @contextmanager
    def _looking(self) -> Iterator[None]:
        outputs: list[Any] = []
        results: list[Any] = []
        with ExitStack() as hooks:
            for module, into in ((self.layer, outputs), (self.module, results)):
                handle = module.register_forward_hook(lambda _module, _args, result, into=into: into.append(result))
                hooks.callback(handle.remove)
            yield
        self._known = True
        self.usable = len(outputs) == len(results) == 1
        if self.usable and isinstance(results[0], tuple):
            first, *others = results[0]
            self._length = 1 + len(others)
            self.usable = first is outputs[0] and all(each is None for each in others)
        elif self.usable:
            self.usable = results[0] is outputs[0]
        if not self.usable:
            self.inputs.clear()


def _keep(seen: dict[str, Tensor], name: str, _module: object, args: tuple[Tensor, ...]) -> None:
    seen[name] = args[0]
