"""ACNR: the iteration on singular values against its definition, and what it does to layers of the embedded model."""

import copy
import json
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carsam.bits.plan import BitPlan
from carsam.calibrate.observers import RangeRecorder
from carsam.compensate.acnr import (
    AcnrReport,
    AcnrSettings,
    _Moments,
    compensate_layers,
    condition_number,
    raise_singular_values,
    reduce_condition,
)
from carsam.errors import ConfigError
from carsam.methods.base import Method
from carsam.models.family import find_sites
from carsam.models.prepare import prepare_model
from carsam.quantizers import simulate
from carsam.run.store import compensation_report
from carsam.run.walk import fit_weights

SETTINGS = AcnrSettings()
SEEDS = st.integers(0, 2**32 - 1)


def layer(seed=0, out=12, inputs=20, decades=4.0):
    """A weight (out, in) whose singular values fall over some decades, and moments of an input's error (in, in)."""
    generator = torch.Generator().manual_seed(seed)
    left, _, right = torch.linalg.svd(torch.randn(out, inputs, generator=generator).double(), full_matrices=False)
    error = torch.randn(64, inputs, generator=generator).double()
    values = torch.logspace(0, -decades, len(right)).double()
    return (left * values @ right).float(), (error.T @ error / 64).float()


def step_by_step(weight, moments, settings):
    """The definition as it reads, with a decomposition of Wᵀ in every iteration."""
    weight = weight.double().T
    for _ in range(settings.iterations):
        u, values, v = torch.linalg.svd(weight, full_matrices=False)
        error = torch.stack([direction @ moments.double() @ direction for direction in u.T])
        pulled = (values + 2 * settings.pull * values.mean()) / (
            1 + 2 * settings.pull + 2 * settings.error_weight * error
        )
        energy = values.square().cumsum(0)
        first = int((energy > settings.energy * energy[-1]).nonzero()[0])
        values[first + 1 :] = torch.maximum(values, pulled)[first + 1 :]
        weight = u @ torch.diag(values) @ v
    return weight.T


@given(seed=SEEDS, shape=st.sampled_from([(12, 20), (20, 12), (8, 8)]))
def test_it_is_the_iteration_of_the_paper(seed, shape):
    weight, moments = layer(seed, *shape)
    settings = replace(SETTINGS, iterations=20)
    new, before, after = reduce_condition(weight, moments, settings)
    assert new.shape == weight.shape and new.dtype == weight.dtype
    torch.testing.assert_close(new.double(), step_by_step(weight, moments, settings), rtol=1e-4, atol=1e-6)
    assert before == pytest.approx(1e4, rel=1e-2)
    assert after == pytest.approx(condition_number(new), rel=1e-2)
    assert after < before


@given(seed=SEEDS, weight=st.floats(0, 10))
def test_singular_values_only_grow_and_main_directions_stay(seed, weight):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(10, generator=generator).double().sort(descending=True).values
    error = torch.rand(10, generator=generator).double()
    settings = replace(SETTINGS, error_weight=weight)
    raised = raise_singular_values(values, error, settings)
    assert bool((raised >= values).all()) and raised.max() == values.max()
    once = raise_singular_values(values, error, replace(settings, iterations=1))
    energy = values.square().cumsum(0)
    kept = int((energy > 0.8 * energy[-1]).nonzero()[0]) + 1
    assert torch.equal(once[:kept], values[:kept]), "in a step; later a raised one may overtake them"


def test_a_step_is_the_least_of_its_objective():
    values, error = torch.tensor([4.0, 1.0, 0.5, 0.01]).double(), torch.tensor([0.0, 0.3, 2.0, 5.0]).double()
    settings = replace(SETTINGS, iterations=1, pull=0.2, error_weight=0.05)
    raised = raise_singular_values(values, error, settings)
    tried = torch.linspace(0, 5, 500_001).double()
    for i in (1, 2, 3):
        objective = (tried - values[i]).square() / 2 + 0.2 * (tried - values.mean()).square()
        objective += 0.05 * error[i] * tried.square()
        assert float(raised[i]) == pytest.approx(max(float(tried[objective.argmin()]), float(values[i])), abs=2e-5)


def test_the_more_error_along_a_direction_the_less_it_is_raised():
    values = torch.tensor([1.0, 0.1, 0.1, 0.1]).double()
    raised = raise_singular_values(values, torch.tensor([0.0, 0.0, 1.0, 100.0]).double(), SETTINGS)
    assert raised[1] > raised[2] > raised[3] >= 0.1


def test_well_conditioned_weights_come_back_as_they_are():
    weight, moments = layer(decades=1.9)
    new, before, after = reduce_condition(weight, moments, SETTINGS)
    assert new is weight and before == after == pytest.approx(10**1.9, rel=1e-3)


def test_weights_without_full_rank_have_finite_condition_numbers():
    assert condition_number(torch.zeros(3, 4)) == 1.0
    weight, moments = layer()
    weight[0] = weight[1]
    new, before, after = reduce_condition(weight, moments, SETTINGS)
    assert 1e6 < before < 1e13 and 1 < after < 100 and bool(torch.isfinite(new).all())


@given(seed=SEEDS)
def test_output_error_from_moments_is_the_error_of_the_outputs(seed):
    generator = torch.Generator().manual_seed(seed)
    exact = [torch.randn(n, 7, 20, generator=generator) for n in (1, 3)]
    quantized = [x + 0.1 * torch.randn(x.shape, generator=generator) for x in exact]
    old, _ = layer(seed)
    new = old + 0.05 * torch.randn(old.shape, generator=generator)
    moments = _Moments()
    for pair in zip(exact, quantized):
        moments.update(*pair)
    want = [x.flatten(0, -2) @ old.T for x in exact]
    wrong = [x.flatten(0, -2) @ new.T - y for x, y in zip(quantized, want)]
    expected = sum(e.square().sum() for e in wrong) / sum(y.square().sum() for y in want)
    assert moments.output_error(old, new) == pytest.approx(float(expected), rel=1e-3)


@pytest.fixture(scope="module")
def problem(nano, small_set):
    """The first decoder block at 4 bits with ranges, its layers, and passes through it."""
    model = copy.deepcopy(nano)
    sites, method = find_sites(model), Method()
    prepare_model(model, sites, BitPlan.parse("w4a4"), method.quantizer_for, method.softmax_for)
    model.requires_grad_(False)
    fit_weights(model.mask_decoder, "min-max")
    with torch.no_grad():
        _, decoder = sites.family.parts(sites)
        block = decoder.stages[0]
        inputs = [
            decoder.enter(nano, {"hidden_states": nano.vision_encoder(image.pixel_values)[0]}, image)
            for image in small_set.images
        ]
    runs = [lambda x=x: block.run(model, x) for x in inputs]
    recorder = RangeRecorder([model.get_submodule(block.name)])
    with recorder.recording(), simulate(weights=False):
        for run in runs:
            run()
    recorder.apply("min-max")
    names = [site.name for site in sites.layers if site.name.startswith(block.name + ".")]
    return model, names, [(run, run) for run in runs]


def test_only_ill_conditioned_layers_change_and_their_grids_follow(problem):
    model, names, passes = problem
    before = {name: model.get_submodule(name).weight.clone() for name in names}
    scales = {name: model.get_submodule(name).weight_scale.clone() for name in names}
    ill = [name for name in names if condition_number(before[name]) >= 100]
    assert 0 < len(ill) < len(names)
    try:
        reports = compensate_layers(model, names, passes, SETTINGS, weight_observer="min-max")
        assert [report.layer for report in reports] == ill
        for name in names:
            touched = model.get_submodule(name)
            assert torch.equal(touched.weight, before[name]) == (name not in ill), name
            assert torch.equal(touched.weight_scale, scales[name]) == (name not in ill), name
        for report in reports:
            old, new = before[report.layer], model.get_submodule(report.layer).weight
            assert report.condition == pytest.approx((condition_number(old), condition_number(new)), rel=1e-2)
            assert report.condition[1] < 20
            assert report.change == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)
            # Not what ACNR lowers: it moves the layer away from its float outputs.
            assert 0 < report.error[0] < report.error[1] < 1
        assert compensate_layers(model, names, passes, SETTINGS) == [], "well conditioned now"
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                model.get_submodule(name).weight.copy_(weight)
        fit_weights(model.mask_decoder, "min-max")


def test_layers_in_floating_point_are_left_alone(problem):
    model, names, passes = problem
    for name in names:
        model.get_submodule(name).weight_bits = 16
    try:
        assert compensate_layers(model, names, passes, SETTINGS) == []
    finally:
        for name in names:
            model.get_submodule(name).weight_bits = 4


def test_a_report_comes_back_from_json():
    report = AcnrReport("a.b", (300.0, 5.0), 0.3, (0.01, 0.02))
    assert compensation_report(json.loads(json.dumps(asdict(report)))) == report


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"condition": 0.5}, "condition"),
        ({"iterations": -1}, "iterations"),
        ({"pull": -0.1}, "pull"),
        ({"error_weight": -1.0}, "error_weight"),
        ({"energy": 1.5}, "energy"),
    ],
)
def test_settings_out_of_range_are_named(settings, what):
    with pytest.raises(ConfigError, match=what):
        AcnrSettings(**settings)
