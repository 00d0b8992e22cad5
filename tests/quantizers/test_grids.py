"""The contract that every registered grid fulfils; a new grid is tested here without an edit."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from carsam.calibrate.observers import RangeRecorder
from carsam.errors import ConfigError
from carsam.quantizers import SiteQuantizer, SoftmaxQuantizer, activation_grids, simulate, softmax_grids
from carsam.quantizers.ranges import OBSERVERS
from carsam.quantizers.site import FakeQuantize

ACTIVATIONS, SOFTMAX = sorted(activation_grids()), sorted(softmax_grids())
EVERY = [(name, activation_grids()[name]) for name in ACTIVATIONS] + [(name, softmax_grids()[name]) for name in SOFTMAX]
every_grid = pytest.mark.parametrize("cls", [cls for _, cls in EVERY], ids=[cls.__name__ for _, cls in EVERY])
every_activation_grid = pytest.mark.parametrize("grid", ACTIVATIONS)
every_softmax_grid = pytest.mark.parametrize("grid", SOFTMAX)
# Two bits leave a logarithmic zone nothing; no row of a table has so few for activations.
BITS = st.integers(3, 8)
SEEDS = st.integers(0, 2**32 - 1)
CHANNELS = 6


def activations(seed):
    """(64, channels) whose channels differ in size, as behind a normalisation layer."""
    x = torch.randn(64, CHANNELS, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([1, 3, 2, 0.5, 1, 4.0]) + torch.tensor([0, 1, -1, 0, 0.5, 0])


def attention(seed):
    """Scores (heads, queries, keys) and the values that P is multiplied with, (heads, keys, dim)."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(2, 12, 32, generator=generator), torch.randn(2, 32, 5, generator=generator)


def calibrated(quantizer, *args, observer="min-max", **kwargs):
    """The quantizer after one recorded pass; what needs no calibration stays as it is."""
    recorder = RangeRecorder([quantizer])
    with recorder.recording(), torch.no_grad():
        quantizer(*args, **kwargs)
    recorder.apply(observer)
    return quantizer


def of_activations(grid, bits, seed=0, **options):
    return calibrated(activation_grids()[grid](bits), activations(seed), **options)


def of_softmax(grid, bits, seed=0):
    scores, value = attention(seed)
    return calibrated(softmax_grids()[grid](bits), scores, value=value)


def codes_stand_for_what_is_computed(quantizer, x, computed):
    codes = quantizer.encode(x)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and int(codes.max()) < 2**quantizer.bits
    # Written in other operations than the fast path: equal up to rounding of single precision.
    torch.testing.assert_close(quantizer.decode(codes), computed, rtol=1e-5, atol=1e-6)
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)


@every_activation_grid
@given(bits=BITS, seed=SEEDS)
def test_codes_stand_for_what_the_model_computes_with(grid, bits, seed):
    quantizer, x = of_activations(grid, bits, seed), activations(seed)
    with simulate(activations=True):
        codes_stand_for_what_is_computed(quantizer, x, quantizer(x))
    # In another image values lie elsewhere, also beyond the grid.
    x = 3 * activations(seed + 1)
    with simulate(activations=True):
        codes_stand_for_what_is_computed(quantizer, x, quantizer(x))


@every_softmax_grid
@given(bits=BITS, seed=SEEDS)
def test_codes_of_softmax_outputs(grid, bits, seed):
    softmax, (scores, value) = of_softmax(grid, bits, seed), attention(seed)
    with simulate(activations=True):
        computed = softmax(scores, value=value)
    assert computed.shape == scores.shape and bool(torch.isfinite(computed).all()) and computed.min() >= 0
    quantizer = softmax.site_quantizer()
    if quantizer is not None:
        codes_stand_for_what_is_computed(quantizer, torch.softmax(scores, -1), computed)


@every_activation_grid
@given(bits=BITS, seed=SEEDS)
def test_values_keep_their_order(grid, bits, seed):
    quantizer = of_activations(grid, bits, seed)
    x = activations(seed + 1).sort(dim=0).values
    with simulate(activations=True):
        assert bool((quantizer(x).diff(dim=0) >= 0).all())
    assert bool((quantizer.encode(x).int().diff(dim=0) >= 0).all())


@every_softmax_grid
@given(bits=BITS, seed=SEEDS)
def test_a_greater_score_never_gets_a_lesser_probability(grid, bits, seed):
    softmax, (scores, value) = of_softmax(grid, bits, seed), attention(seed)
    with simulate(activations=True):
        computed = softmax(scores.sort(dim=-1).values, value=value)
    assert bool((computed.diff(dim=-1) >= 0).all())


@every_activation_grid
def test_far_values_take_the_ends_of_the_grid(grid):
    quantizer = of_activations(grid, 4)
    ends = quantizer.decode(torch.tensor([[0], [15]], dtype=torch.uint8).expand(2, CHANNELS))
    far = torch.tensor([[-1e6], [1e6]]).expand(2, CHANNELS)
    with simulate(activations=True):
        torch.testing.assert_close(quantizer(far), ends)
    assert bool(quantizer.clipped(far).all()) and not bool(quantizer.clipped(ends).any())


@every_activation_grid
@pytest.mark.parametrize("observer", OBSERVERS)
def test_more_bits_are_finer(grid, observer):
    x = activations(3)
    errors = []
    for bits in (3, 5, 8):
        quantizer = of_activations(grid, bits, 3, observer=observer)
        with simulate(activations=True):
            errors.append((quantizer(x) - x).square().mean().item())
    assert errors[0] > errors[1] > errors[2] and errors[0] < 0.3 * x.var()


@every_activation_grid
@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("values", ["zero", "constant", "positive", "negative"])
def test_one_sided_and_constant_sites_have_a_grid(grid, observer, values):
    x = {
        "zero": torch.zeros(8, CHANNELS),
        "constant": torch.full((8, CHANNELS), 2.5),
        "positive": activations(0).abs() + 1,
        "negative": -activations(0).abs() - 1,
    }[values]
    quantizer = calibrated(activation_grids()[grid](4), x, observer=observer)
    assert quantizer.is_calibrated and quantizer.fault() == ""
    with simulate(activations=True):
        assert (quantizer(x) - x).abs().max() <= 0.25 * x.abs().max()


@every_grid
def test_it_is_built_again_from_config_and_buffers(cls):
    """What pack writes and load reads: the spec and the buffers, nothing else."""
    softmax = issubclass(cls, SoftmaxQuantizer)
    quantizer = of_softmax(cls.grid, 4) if softmax else of_activations(cls.grid, 4)
    spec = quantizer.spec()
    assert (spec.pop("grid"), spec["bits"]) == (cls.grid, 4)
    assert set(spec) == {"bits", *cls.arguments}
    assert all(type(spec[name]) is int and 0 <= spec[name] <= most for name, most in cls.arguments.items())
    again = cls(**spec, always=True)
    again.load_state_dict(load(save({name: value.clone() for name, value in quantizer.state_dict().items()})))
    assert again.spec() == quantizer.spec()
    assert all(module.fault() == "" for module in again.modules() if hasattr(module, "fault"))
    inputs = attention(0) if softmax else (activations(0),)
    with simulate(activations=True):
        simulated = quantizer(*inputs)
    assert torch.equal(again(*inputs), simulated), "it always quantizes, and to the same values"


@every_grid
def test_sixteen_bits_leave_values_as_they_are(cls):
    quantizer = cls(16, always=True)
    assert not quantizer.state_dict() and quantizer.fault() == ""
    assert quantizer.spec()["bits"] == quantizer.bits == 16
    if issubclass(cls, SoftmaxQuantizer):
        scores, value = attention(0)
        assert torch.equal(quantizer(scores, value=value), torch.softmax(scores, -1))
    else:
        assert torch.equal(quantizer(activations(0)), activations(0))


@every_grid
def test_nothing_is_quantized_while_nothing_is_simulated(cls):
    if issubclass(cls, SoftmaxQuantizer):
        scores, value = attention(0)
        assert torch.equal(of_softmax(cls.grid, 4)(scores, value=value), torch.softmax(scores, -1))
    else:
        assert torch.equal(of_activations(cls.grid, 4)(activations(0)), activations(0))


@every_activation_grid
def test_without_a_range_calibration_is_named(grid):
    quantizer = activation_grids()[grid](4)
    assert quantizer.fault() == "no usable scale" and not quantizer.is_calibrated
    with simulate(activations=True), pytest.raises(RuntimeError, match="run calibration first"):
        quantizer(activations(0))


@every_activation_grid
def test_an_unknown_observer_names_the_choices_or_is_of_no_use_to_the_grid(grid):
    quantizer = activation_grids()[grid](4)
    try:
        calibrated(quantizer, activations(0), observer="median")
    except ConfigError as error:
        assert all(observer in str(error) for observer in OBSERVERS)
    else:
        assert quantizer.is_calibrated


def site_quantizers():
    """Every quantizer with a scale to learn, and values for it."""
    for grid in ACTIVATIONS:
        yield of_activations(grid, 4), 1.5 * activations(1)
    for grid in SOFTMAX:
        quantizer = of_softmax(grid, 4).site_quantizer()
        if quantizer is not None:
            yield quantizer, torch.softmax(attention(1)[0], -1)


@pytest.mark.parametrize(("quantizer", "x"), [pytest.param(q, x, id=type(q).__name__) for q, x in site_quantizers()])
def test_scale_gradient_is_that_of_lsq(quantizer, x):
    x = x.clone().requires_grad_()
    factor = torch.tensor(1.0, requires_grad=True)
    out = FakeQuantize.apply(x, quantizer.step_along(x) * factor, quantizer, None)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    out.backward(grad)
    inside = ~quantizer.clipped(x)
    assert bool(inside.any())
    torch.testing.assert_close(x.grad, grad * inside)
    # d x̂ / d log s: x̂ − x inside the grid, x̂ where clipped, as seen from what the scale does not move.
    origin = quantizer.origin()
    expected = (grad * (out - origin - (x - origin) * inside)).sum()
    torch.testing.assert_close(factor.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("quantizer", "x"), [pytest.param(q, x, id=type(q).__name__) for q, x in site_quantizers()])
@pytest.mark.parametrize("relative", [True, False])
def test_a_learned_scale_settles_into_the_buffer(quantizer, x, relative):
    before = quantizer.scale.clone()
    parameter = quantizer.learn_scale(relative=relative)
    torch.testing.assert_close(quantizer.step(), before)
    with torch.no_grad():
        parameter.add_(0.01)
    quantizer.settle()
    assert quantizer.learned is None and bool((quantizer.scale > before).all())
    quantizer.scale.copy_(before)


@every_softmax_grid
def test_gradients_reach_the_scores(grid):
    softmax, (scores, value) = of_softmax(grid, 4), attention(1)
    scores.requires_grad_()
    with simulate(activations=True):
        (softmax(scores, value=value) @ value).square().sum().backward()
    assert bool(torch.isfinite(scores.grad).all()) and bool(scores.grad.any())


def test_grids_of_activations_and_of_softmax_are_told_apart():
    assert all(not issubclass(cls, SoftmaxQuantizer) for cls in activation_grids().values())
    assert all(issubclass(cls, SoftmaxQuantizer) for cls in softmax_grids().values())
    assert {"uniform", "grouped", "log-uniform"} <= set(ACTIVATIONS)
    assert {"uniform", "row-max", "log2"} <= set(SOFTMAX)


@pytest.fixture
def forget():
    """Classes defined in a test are gone after it."""
    yield
    gc.collect()
    assert sorted(activation_grids()) == ACTIVATIONS and sorted(softmax_grids()) == SOFTMAX


def test_two_grids_of_one_name_are_an_error_that_names_both(forget):
    class Another(SiteQuantizer):
        grid = "uniform"

    with pytest.raises(ConfigError, match=r"two activation grids are called 'uniform'.*ActivationQuantizer.*Another"):
        activation_grids()
    assert sorted(softmax_grids()) == SOFTMAX


def test_a_grid_that_is_defined_again_replaces_itself(forget):
    def cell():
        class Mine(SiteQuantizer):
            grid = "mine"

        return Mine

    first = cell()
    assert activation_grids()["mine"] is first
    second = cell()
    assert activation_grids()["mine"] is second
