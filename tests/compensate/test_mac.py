"""MAC on a decoder attention of the embedded model: what it changes, what it leaves alone, what it gains."""

import copy

import pytest
import torch

from carsam.bits.plan import BitPlan
from carsam.calibrate.observers import RangeRecorder
from carsam.compensate.mac import (
    Coupled,
    MacSettings,
    add_to_projection,
    attention_calls,
    compensate_attention,
    projection_matrix,
    split_heads,
    with_ones,
)
from carsam.errors import ConfigError
from carsam.methods.base import Method
from carsam.models.family import find_sites
from carsam.models.prepare import prepare_model
from carsam.quantizers import simulate
from carsam.run.walk import fit_weights


@pytest.fixture(scope="module")
def problem(nano, small_set):
    """The first token→image attention at 4 bits with ranges, and runs that reach it."""
    model = copy.deepcopy(nano)
    sites, method = find_sites(model), Method()
    prepare_model(model, sites, BitPlan.parse("w4a4"), method.quantizer_for, method.softmax_for)
    model.requires_grad_(False)
    fit_weights(model.mask_decoder, "mse")
    with torch.no_grad():
        _, decoder = sites.family.parts(sites)
        block = decoder.stages[0]
        inputs = [
            decoder.enter(nano, {"hidden_states": nano.vision_encoder(image.pixel_values)[0]}, image)
            for image in small_set.images
        ]
    recorder = RangeRecorder([model.get_submodule(block.name)])
    with recorder.recording(), simulate(weights=True):
        for item in inputs:
            block.run(model, item)
    recorder.apply("mse")
    return model, next(site for site in sites.attentions if site.name == sites.focus[0]), block, inputs


def compensated(problem, **settings):
    model, site, block, inputs = problem
    model = copy.deepcopy(model)
    runs = [lambda item=item: block.run(model, item) for item in inputs]
    return model.get_submodule(site.name), compensate_attention(Coupled.of(model, site), runs, MacSettings(**settings))


@torch.no_grad()
def test_projections_per_head_are_the_layer(problem):
    model, site, *_ = problem
    layer = model.get_submodule(site.query.layer)
    x = torch.randn(2, 1, 5, 256)
    per_head = with_ones(x)[:, None] @ projection_matrix(layer, 8)
    torch.testing.assert_close(per_head, split_heads(layer(x), 8), atol=1e-4, rtol=1e-4)
    layer = copy.deepcopy(layer)
    change = torch.randn(8, 257, 16)
    expected = projection_matrix(layer, 8) + change
    add_to_projection(layer, change)
    torch.testing.assert_close(projection_matrix(layer, 8), expected)


@pytest.mark.parametrize("solver", ["pooled", "exact"])
def test_query_and_key_branches_lower_the_error_of_the_scores(problem, solver):
    _, report = compensated(problem, solver=solver)
    assert report.scores[1] < report.scores[0]
    assert set(report.change) == {"query", "key"}


def test_value_branch_lowers_the_error_of_pv_and_touches_v_alone(problem):
    model, site, *_ = problem
    before = model.get_submodule(site.name)
    attention, report = compensated(problem, query=False, key=False, value=True, value_damping=0.1)
    assert report.output[1] < report.output[0]
    assert torch.equal(attention.q_proj.weight, before.q_proj.weight)
    assert torch.equal(attention.k_proj.weight, before.k_proj.weight)
    assert not torch.equal(attention.v_proj.weight, before.v_proj.weight)


def test_grids_follow_the_changed_weights(problem):
    """After compensation the weight grids fit W + D, not W: no weight lies further off than half a step."""
    attention, _ = compensated(problem, damping=0.01)
    for layer in (attention.q_proj, attention.k_proj):
        scale = layer.weight_scale.clone()
        layer.fit_weight()
        assert torch.equal(layer.weight_scale, scale)


def test_settings_out_of_range_are_refused():
    for wrong in ({"solver": "lu"}, {"damping": 0.0}, {"value_damping": -1.0}):
        with pytest.raises(ConfigError):
            MacSettings(**wrong)


@torch.no_grad()
def test_sequential_order_float_targets_and_chosen_damping_lower_the_error_of_the_scores(problem):
    model, site, block, inputs = problem
    fresh = copy.deepcopy(model)
    floating = list(
        attention_calls(Coupled.of(fresh, site), [lambda i=i: block.run(fresh, i) for i in inputs], quantized=False)
    )
    for settings in ({"order": "sequential"}, {"targets": "float"}, {"damping": None, "order": "sequential"}):
        model = copy.deepcopy(fresh)
        runs = [lambda item=item, model=model: block.run(model, item) for item in inputs]
        report = compensate_attention(Coupled.of(model, site), runs, MacSettings(**settings), floating=floating)
        assert report.scores[1] < report.scores[0], settings
        if settings.get("damping", 1.0) is None:
            assert set(report.damping) == {"query", "key"}


@pytest.mark.parametrize("setting", ["order", "targets", "solver"])
def test_unknown_choices_are_refused(setting):
    with pytest.raises(ConfigError, match=setting):
        MacSettings(**{setting: "backwards"})
