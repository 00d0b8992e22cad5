"""The tuning of the finished model: its loss, what it changes and what it leaves, on every family with masks."""

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_model
from torch import nn

import carsam
from carsam.config import QuantizeConfig
from carsam.errors import ConfigError
from carsam.models.family import family_of
from carsam.prompts.calibration import CalibrationSet
from carsam.prompts.image import PromptedImage
from carsam.quantizers import ActivationQuantizer, QuantizedLayer, simulate
from carsam.reconstruct import tuning
from carsam.reconstruct.tuning import TuningSettings, mask_error

STEPS = 20
MAPS = {"map_steps": 0}
QUICK: dict = {
    "weight_observer": "min-max",
    "activation_observer": "min-max",
    "learn": False,
    "refit": {"enabled": False},
    "masks": {"share": 0.0},
    "equivalences": {
        "foldings": [],
        "softmax": ["uniform"],
        "smoothing": [],
        "shift": False,
        "observers": [],
        "map_steps": 0,
    },
}


@functools.cache
def subject(name):
    """A small model, read-only, and four images of noise with two boxes each."""
    model = small_model(name)
    side, generator, images = family_of(model).image_size(model), torch.Generator().manual_seed(0), []
    for index in range(4):
        corners = torch.rand(2, 2, 2, generator=generator).sort(dim=1).values * (side - 1)
        pixels = torch.randn(1, 3, side, side, generator=generator)
        images.append(PromptedImage(str(index), pixels, corners.flatten(1)))
    return model, CalibrationSet.of(images)


@functools.cache
def quantized(name, steps, decoder_only=False):
    model, data = subject(name)
    settings = {**QUICK, "tuning": {"steps": steps, "rate": 1e-3}}
    config = QuantizeConfig("car-sam-plus", settings, decoder_only=decoder_only)
    return carsam.quantize(model, data, config)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 200), st.integers(1, 200))
def test_of_two_masks_without_grey_the_loss_is_their_iou(seed, first, second):
    order = torch.randperm(256, generator=torch.Generator().manual_seed(seed))
    found, goal = torch.zeros(256), torch.zeros(256)
    found[order[:first]] = 1
    goal[order[first // 2 : first // 2 + second]] = 1
    both = (found * goal).sum()
    iou = both / (found.sum() + goal.sum() - both)
    logits = (60 * (found - 0.5)).view(1, 1, 16, 16)
    assert mask_error(logits, goal.view(1, 1, 16, 16)).item() == pytest.approx(((1 - iou) / (1 + iou)).item(), abs=1e-5)


@pytest.mark.parametrize("name", ["sam", "sam2", "tinyvit"])
def test_tuning_lowers_the_loss_of_the_image_that_judges_and_leaves_the_integers(name):
    plain, tuned = quantized(name, 0), quantized(name, STEPS)
    assert plain.report.tuning is None
    report = tuned.report.tuning
    assert report.after < report.before
    assert 0 < report.best <= report.steps == STEPS
    before, after = plain.model.state_dict(), tuned.model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    kinds = {key.rsplit(".", 1)[-1] for key in changed}
    assert {"scale", "weight_scale", "bias"} <= kinds
    assert not kinds & {"codes", "packed", "weight_zero_point", "zero_point"}
    for part in ("vision_encoder.", "mask_decoder."):
        assert any(key.startswith(part) for key in changed)
    assert tuned.to_dict()["tuning"]["values"] == report.values > 0


def test_of_a_decoder_alone_the_encoder_is_left():
    plain, tuned = quantized("sam", 0, True), quantized("sam", STEPS, True)
    before, after = plain.model.state_dict(), tuned.model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("mask_decoder.transformer.") for key in changed)


def test_what_is_computed_twice_is_the_same(monkeypatch):
    kept = quantized("sam", STEPS)
    monkeypatch.setattr(tuning, "CHECKPOINTED", 1)
    again = quantized.__wrapped__("sam", STEPS)
    for a, b in zip(kept.model.state_dict().values(), again.model.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_scales_of_integer_weights_are_learned_and_settle():
    layer = QuantizedLayer(nn.Linear(6, 4), 4, ActivationQuantizer(16))
    layer.weight.requires_grad_(False)
    layer.fit_weight("min-max")
    layer.freeze()
    codes, scale, weight = layer.codes.clone(), layer.weight_scale.clone(), layer.weight.clone()
    learned = layer.learn_scales()
    with simulate(weights=True, activations=True):
        torch.testing.assert_close(layer.simulated_weight(), weight, rtol=0, atol=0)
        layer(torch.ones(2, 6)).sum().backward()
    assert learned.grad.shape == scale.shape and learned.grad.abs().min() > 0
    with torch.no_grad():
        learned.copy_(torch.tensor([0.0, 0.1, -0.1, 0.5]))
    promised = layer.simulated_weight().detach()
    layer.settle()
    assert torch.equal(layer.codes, codes)
    torch.testing.assert_close(layer.weight_scale, scale * torch.tensor([0.0, 0.1, -0.1, 0.5]).exp())
    torch.testing.assert_close(layer.weight, promised, rtol=1e-5, atol=1e-7)
    layer.settle()  # nothing is learned any more
    assert torch.equal(layer.codes, codes)


def test_settings_out_of_range_are_refused():
    for wrong in ({"steps": -1}, {"steps": 10**9}, {"rate": 0.0}):
        with pytest.raises(ConfigError, match="tuning"):
            TuningSettings(**wrong)


def test_the_float_model_is_left_as_it_was():
    model, _ = subject("sam")
    before = copy.deepcopy(model.state_dict())
    quantized("sam", STEPS)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
