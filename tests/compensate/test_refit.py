"""The refit of a unit's layers: convolutions as products, errors on held-out items, weights on their grids."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_units import passes, with_ranges
from torch import nn

from carsam.compensate.passes import QuantizedPasses, grouped, matrix, rows_of, set_matrix
from carsam.compensate.refit import RefitSettings, refit_layers
from carsam.errors import ConfigError
from carsam.quantizers import ActivationQuantizer, QuantizedLayer, simulate


def drawn(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]), st.integers(1, 2), st.booleans())
def test_a_convolution_is_the_product_of_its_rows_and_its_matrix(seed, groups, kernel, stride, bias):
    source = nn.Conv2d(4, 8, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)
    layer = QuantizedLayer(source, 16, ActivationQuantizer(16))
    x = torch.randn(2, 4, 6, 5, generator=drawn(seed))
    inputs = rows_of(layer, x, most=1000)
    if bias:
        inputs = torch.nn.functional.pad(inputs, (0, 1), value=1.0)
    product = inputs @ matrix(layer)  # (groups, batch · places, out / groups)
    expected = layer(x).flatten(2).unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5)
    before = layer.weight.clone()
    set_matrix(layer, matrix(layer))
    assert torch.equal(layer.weight, before)


class Two(nn.Module):
    """A convolution and a Linear, the unit of these tests."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.linear = nn.Linear(8, 6)

    def forward(self, x):
        return self.linear(torch.relu(self.conv(x)).permute(0, 2, 3, 1))


@pytest.fixture
def case(request):
    """The float unit, the same being quantized to 3 bits (weights: what is asked for), and 24 items for both."""
    weight_bits = getattr(request, "param", 3)
    torch.manual_seed(0)
    reference = Two().requires_grad_(False)
    # Channels that go together, as a network's do: one makes up for what the grid does to another.
    mixing = torch.randn(3, 3) * torch.tensor([0.2, 1.0, 3.0])
    items = [1 + torch.einsum("oc,bchw->bohw", mixing, torch.randn(1, 3, 8, 8, generator=drawn(i))) for i in range(24)]
    return reference, with_ranges(copy.deepcopy(reference), ["conv", "linear"], items, weight_bits, 3), items


def error(reference, model, items):
    with torch.no_grad(), simulate(weights=True, activations=True):
        return sum((model(item) - reference(item)).square().sum().item() for item in items)


@pytest.mark.parametrize(("case", "feedback"), [(8, False), (3, True)], indirect=["case"])
def test_errors_fall_also_on_items_that_it_has_not_seen(case, feedback):
    reference, model, items = case
    before = error(reference, model, items[16:])
    reports, _ = refit_layers(model, *passes(model, ["conv", "linear"], items[:16]), RefitSettings(), feedback=feedback)
    assert error(reference, model, items[16:]) < 0.8 * before
    assert [report.refitted for report in reports] == ["conv", "linear"] and reports[0].kind == "weights"
    for report in reports:
        # The second layer may have nothing to win: nothing is changed then.
        assert report.error[1] < report.error[0] or report.kind == "none"
        assert (report.rounded[1] < report.rounded[0]) or not feedback
    if not feedback:
        return
    for layer in (model.conv, model.linear):
        rounded = layer.weight.clone()
        layer.freeze()
        torch.testing.assert_close(layer.weight, rounded, rtol=1e-5, atol=1e-6)
        assert layer.codes.max() <= 7


class Projections(nn.Module):
    """Two layers that read one input, and one that reads what both give."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)) * self.second(x))


@torch.no_grad()
def test_layers_that_do_not_read_each_other_share_a_pass():
    torch.manual_seed(0)
    names, calls = ["first", "second", "last"], []
    items = [torch.randn(40, 6, generator=drawn(i)) for i in range(8)]
    model = with_ranges(Projections(), names, items, 3, 3)
    other = copy.deepcopy(model)

    def counted(each):
        found, rows = passes(each, names, items)
        runs = [lambda run=run: (calls.append(1), run()) for run in found.runs]
        return QuantizedPasses(each, names, runs), rows

    refit_layers(model, *counted(model), RefitSettings(), feedback=True)
    apart, calls[:] = len(calls), []
    refit_layers(other, *counted(other), RefitSettings(), feedback=True, together=[("first", "second")])
    assert (apart, len(calls)) == (3 * len(items), 2 * len(items))
    for name in names:
        assert torch.equal(model.get_submodule(name).weight, other.get_submodule(name).weight)


def test_only_neighbours_share_a_pass():
    together = [("q", "k", "v"), ("x", "x", "x")]
    assert grouped(["q", "k", "v", "o", "x"], together) == [["q", "k", "v"], ["o"], ["x"]]
    assert grouped(["q", "o", "k"], together) == [["q"], ["o"], ["k"]]
    assert grouped(["a", "b"], ()) == [["a"], ["b"]]


def test_targets_are_the_float_models(case):
    """Float rows are gathered before the first layer changes: the second layer is fitted to the float unit."""
    reference, model, items = case
    (_, second), _ = refit_layers(model, *passes(model, ["conv", "linear"], items), RefitSettings(), feedback=True)
    x = torch.cat([torch.relu(reference.conv(item)).permute(0, 2, 3, 1).flatten(0, 2) for item in items])
    with torch.no_grad(), simulate(weights=True, activations=True):
        got = torch.cat([model(item).flatten(0, 2) for item in items])
    want = reference.linear(x)
    error = ((got - want).square().sum() / want.square().sum()).item()
    assert second.rounded[1] == pytest.approx(error, rel=1e-3)


def test_what_makes_held_out_items_worse_is_left_alone(case):
    _, model, items = case
    for layer in (model.conv, model.linear):
        layer.input_quantizer = ActivationQuantizer(16)  # nothing to compensate
    before = [matrix(layer) for layer in (model.conv, model.linear)]
    reports, _ = refit_layers(model, *passes(model, ["conv"], items), RefitSettings(), feedback=False)
    assert (reports[0].kind, reports[0].damping, reports[0].change) == ("none", None, 0)
    assert torch.equal(matrix(model.conv), before[0])


def test_biases_alone(case):
    _, model, items = case
    weight = model.linear.weight.clone()
    settings = RefitSettings(weights=False)
    (report,), _ = refit_layers(model, *passes(model, ["linear"], items), settings, feedback=False)
    assert report.kind == "bias" and torch.equal(model.linear.weight, weight)
    assert report.error[1] < report.error[0]


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="positive"):
        RefitSettings(damping=0.0)
    with pytest.raises(ConfigError, match="image"):
        RefitSettings(items=0)
