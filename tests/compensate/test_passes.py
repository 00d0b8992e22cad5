"""Passes of the refit: rows of the float model, and finished modules that are not computed again."""

import pytest
import torch
from torch import nn

from carsam.calibrate.observers import RangeRecorder
from carsam.compensate import passes
from carsam.compensate.passes import FloatRows, QuantizedPasses
from carsam.quantizers import ActivationQuantizer, QuantizedLayer, simulate

LAYERS = ["block.attn.first", "block.attn.last", "block.mlp.up", "block.mlp.down"]


class Attention(nn.Module):
    """Two layers; ``shape`` says how what the last gives is handed on."""

    def __init__(self, shape):
        super().__init__()
        self.first, self.last, self.shape, self.calls = nn.Linear(6, 6), nn.Linear(6, 6), shape, 0

    def forward(self, x):
        self.calls += 1
        given = self.last(torch.tanh(self.first(x)))
        return {"alone": given, "tuple": (given, None), "pair": (given, x), "scaled": 2 * given}[self.shape]


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.attn, self.mlp = Attention(shape), Mlp()

    def forward(self, x):
        given = self.attn(x)
        x = x + (given[0] if isinstance(given, tuple) else given)
        return x + self.mlp(x)


@torch.no_grad()
def quantized(shape):
    """A block of integers with ranges, in a model, and items to run it on."""
    torch.manual_seed(0)
    model = nn.Module()
    model.block = Block(shape).requires_grad_(False)
    for name in LAYERS:
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, QuantizedLayer(model.get_submodule(name), 4, ActivationQuantizer(4)))
    items = [torch.randn(3, 5, 6) for _ in range(6)]
    recorder = RangeRecorder([model.block])
    with recorder.recording():
        for item in items:
            model.block(item)
    recorder.apply("mse")
    for name in LAYERS:
        model.get_submodule(name).fit_weight()
    model.block.attn.calls = 0
    return model, items


def seen(model, items):
    """Inputs of every layer, group by group as the refit asks for them."""
    found = QuantizedPasses(model, LAYERS, [lambda item=item: model.block(item) for item in items])
    return [[each[name] for each in found.inputs([name])] for name in LAYERS]


@torch.no_grad()
@pytest.mark.parametrize(("shape", "skipped"), [("alone", 2), ("tuple", 2), ("pair", 0), ("scaled", 0)])
def test_a_finished_module_is_computed_once_more_and_left_out_then(shape, skipped):
    model, items = quantized(shape)
    found = seen(model, items)
    # Its two layers want it, then each of the two behind; left out there, the first item alone computes it once.
    passes_of = 4 * len(items)
    assert model.block.attn.calls == (passes_of if not skipped else passes_of - 2 * len(items) + 1)
    assert "forward" not in model.block.attn.__dict__
    for name, inputs in zip(LAYERS, found):
        for item, value in zip(items, inputs):
            wanted = []
            hook = model.get_submodule(name).register_forward_pre_hook(lambda _m, args, to=wanted: to.append(args[0]))
            with simulate(weights=True, activations=True):
                model.block(item)
            hook.remove()
            assert torch.equal(value, wanted[0])


@torch.no_grad()
def test_what_does_not_fit_is_computed_again(monkeypatch):
    model, items = quantized("alone")
    monkeypatch.setattr(passes, "KEPT_BYTES", items[0].nbytes * len(items) - 1)
    seen(model, items)
    assert model.block.attn.calls == 4 * len(items)


@torch.no_grad()
def test_float_rows_are_in_the_order_of_execution_and_no_more_than_asked():
    model, items = quantized("alone")
    rows = FloatRows(model, LAYERS[::-1], 4)
    with rows.watching():
        for item in items:
            model.block(item)
    assert list(rows.rows) == LAYERS
    assert [len(each) for each in rows.rows.values()] == [4] * 4
    # Tokens, and a column of ones for the bias.
    assert rows.rows[LAYERS[0]][0].shape == (1, 15, 7)
    model.block(items[0])
    assert len(rows.rows[LAYERS[0]]) == 4


@torch.no_grad()
def test_the_finished_unit_runs_without_what_is_finished_in_it():
    model, items = quantized("tuple")
    runs = [lambda item=item: model.block(item) for item in items]
    found = QuantizedPasses(model, LAYERS, runs[:4])
    for name in LAYERS:
        list(found.inputs([name]))
    with simulate(weights=True, activations=True):
        whole = [run() for run in runs]
        model.block.attn.calls = 0
        for index, run in enumerate(runs):
            with found.left_out(index):
                assert torch.equal(run(), whole[index])
    assert model.block.attn.calls == 2  # on the items that no pass had seen
