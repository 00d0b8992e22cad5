"""The spread of outputs: what it is, what the refit takes of it, and that it comes back with integers as they were."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_units import passes, with_ranges
from torch import nn

from carsam.compensate.passes import QuantizedPasses, fitted_rows, matrix
from carsam.compensate.refit import RefitSettings, refit_layers
from carsam.compensate.spread import MOST, Spread, restore, restore_layers
from carsam.errors import ConfigError
from carsam.quantizers import ActivationQuantizer, QuantizedLayer, simulate


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def quantized(source, bits=4):
    layer = QuantizedLayer(source.requires_grad_(False), bits, ActivationQuantizer(16))
    layer.fit_weight()
    return layer


def outputs_of(layer, x):
    with torch.no_grad(), simulate(weights=True, activations=True):
        return layer(x)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.booleans(), st.sampled_from([1, 2]))
def test_moments_tell_how_outputs_spread(seed, bias, groups):
    torch.manual_seed(seed)
    layer = quantized(nn.Conv2d(4, 6, 3, padding=1, groups=groups, bias=bias), 16)
    rows = fitted_rows(layer, 1 + torch.randn(2, 4, 6, 6, generator=drawn(seed))).double()
    found = Spread.of(matrix(layer), rows.transpose(-2, -1) @ rows, rows.shape[1], ones=bias)
    outputs = rows @ matrix(layer).double()
    mean = outputs.mean(1) if bias else torch.zeros_like(found.mean)
    torch.testing.assert_close(found.mean, mean)
    # Without a bias that could move along, around zero.
    torch.testing.assert_close(found.variance, (outputs - mean[:, None]).square().mean(1))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.booleans(), st.booleans())
def test_widening_moves_outputs_from_a_value_and_no_integer(seed, bias, frozen):
    torch.manual_seed(seed)
    layer = quantized(nn.Linear(5, 3, bias=bias))
    before = copy.deepcopy(layer)
    before.freeze()
    if frozen:
        layer.freeze()
    gain, around = 1 + torch.rand(3), torch.randn(3) if bias else torch.zeros(3)
    layer.widen(gain, around)
    layer.freeze()
    assert torch.equal(layer.codes, before.codes)
    x = torch.randn(7, 5)
    torch.testing.assert_close(outputs_of(layer, x), around + gain * (outputs_of(before, x) - around))


def test_what_spreads_less_is_given_back_and_what_spreads_more_is_left():
    layer = quantized(nn.Linear(6, 3), 16)
    x = torch.randn(400, 6, generator=drawn(0))
    before = outputs_of(layer, x)
    found = Spread(before.mean(0)[None], before.var(0, correction=0)[None])
    wanted = Spread(found.mean, found.variance * torch.tensor([[1.44, 0.5, 100.0]]))
    gain = restore(layer, found, wanted, share=1.0)
    after = outputs_of(layer, x)
    torch.testing.assert_close(after.std(0) / before.std(0), torch.tensor([1.2, 1.0, MOST]))
    torch.testing.assert_close(after.mean(0), before.mean(0))
    assert gain == pytest.approx((1.2 + 1 + MOST) / 3)


class Chain(nn.Module):
    """Two layers, one behind the other; the first has no bias that could move along."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 10, bias=False), nn.Linear(10, 8)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def case():
    """The float unit, the same with inputs of two bits, and 24 items."""
    torch.manual_seed(0)
    reference = Chain().requires_grad_(False)
    items = [torch.randn(64, 12, generator=drawn(i)) for i in range(24)]
    return reference, with_ranges(copy.deepcopy(reference), ["first", "second"], items, 8, 2), items


def fitted(model, items, **changes):
    over, rows = passes(model, ["first", "second"], items)
    reports, spreads = refit_layers(model, over, rows, RefitSettings(damping=0.01, **changes), feedback=True)
    return reports, spreads, over.runs


def ratio(model, reference, items):
    """Standard deviations of the unit's outputs to the float model's."""
    x = torch.cat(items)
    return outputs_of(model, x).std(0) / reference(x).std(0)


def test_the_refit_draws_outputs_to_their_mean_and_the_spread_comes_back(case):
    reference, model, items = case
    narrow = copy.deepcopy(model)
    reports, _, _ = fitted(narrow, items[:16], spread=0.0)
    assert {report.gain for report in reports} == {1.0}
    assert ratio(narrow, reference, items[16:]).max() < 0.97
    reports, _, _ = fitted(model, items[:16])
    assert all(report.gain > 1.02 for report in reports)
    # On items that it has not seen: as they spread in the float model, to what 16 items of 64 rows tell.
    found = ratio(model, reference, items[16:])
    torch.testing.assert_close(found, torch.ones(8), rtol=0, atol=0.1)
    assert found.mean() == pytest.approx(1, abs=0.03)
    for layer in (model.first, model.second):
        rounded = layer.weight.clone()
        layer.freeze()
        torch.testing.assert_close(layer.weight, rounded, rtol=1e-5, atol=1e-6)


def test_a_finished_unit_gets_its_spread_back_layer_by_layer(case):
    reference, model, items = case
    _, spreads, runs = fitted(model, items, spread=0.0)
    for layer in (model.first, model.second):
        layer.freeze()
    codes = [layer.codes.clone() for layer in (model.first, model.second)]
    restore_layers(model, QuantizedPasses(model, ["first", "second"], runs), spreads, 1.0)
    torch.testing.assert_close(ratio(model, reference, items), torch.ones(8), rtol=0, atol=1e-3)
    for layer, before in zip((model.first, model.second), codes):
        assert torch.equal(layer.codes, before)


def test_biases_alone_leave_the_spread_as_it_is(case):
    _, model, items = case
    (report,), _ = refit_layers(model, *passes(model, ["first"], items), RefitSettings(weights=False), feedback=False)
    assert report.gain == 1.0


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ConfigError, match="0 to 2"):
        RefitSettings(spread=-0.1)
