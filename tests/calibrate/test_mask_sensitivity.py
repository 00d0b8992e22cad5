"""What the masks make of errors: stage by stage as in one piece, what it promises, and what it is used for."""

import copy
import functools

import pytest
import torch
from small_models import small_model

from carsam.bits.plan import BitPlan
from carsam.calibrate import sensitivity
from carsam.calibrate.sensitivity import MaskSensitivity, SensitivitySettings, mask_sensitivity, sampled_rows
from carsam.compensate.passes import FloatRows, QuantizedPasses, rows_of
from carsam.compensate.refit import RefitSettings, refit_layers
from carsam.config import QuantizeConfig
from carsam.errors import ConfigError
from carsam.methods.base import create
from carsam.models.family import family_of, find_sites
from carsam.models.forward import encode_image, remembered
from carsam.pipeline import quantize
from carsam.prompts.calibration import CalibrationSet
from carsam.prompts.image import PromptedImage
from carsam.quantizers import ActivationQuantizer, QuantizedLayer, simulate

FAMILIES = ("sam", "sam2", "tinyvit")


@functools.cache
def subject(name):
    """A small model of a family, read-only, and three images of noise with two boxes each."""
    model = small_model(name).requires_grad_(False)
    generator, side, images = torch.Generator().manual_seed(0), family_of(model).image_size(model), []
    for index in range(3):
        corners = torch.rand(2, 2, 2, generator=generator).sort(dim=1).values * (side - 1)
        images.append(PromptedImage(str(index), torch.randn(1, 3, side, side, generator=generator), corners.flatten(1)))
    return model, find_sites(model), CalibrationSet.of(images)


@functools.cache
def found(name, encoder=True):
    model, sites, data = subject(name)
    return mask_sensitivity(model, sites, data, SensitivitySettings(share=1.0, encoder=encoder))


@pytest.mark.parametrize("name", FAMILIES)
def test_going_back_stage_by_stage_is_going_back_through_the_whole_model(name, monkeypatch):
    model, sites, data = subject(name)
    passes = sensitivity._Passes(model, sites, torch.device("cpu"))
    image, whole = data.images[0], {}
    torch.manual_seed(5)
    with torch.enable_grad(), sensitivity._outputs(model, passes.layers, whole):
        values = passes.encoder.enter(model, {}, image)
        for stage in passes.encoder.stages:
            values = stage.step(model, values)
        pull = sensitivity.relative_pull(*passes.family.decode(model, values, image))
        gradients = torch.autograd.grad(pull, list(whole.values()), allow_unused=True)
    squares, inputs = {}, passes.forwards(image)
    torch.manual_seed(5)  # the same direction
    pulls = passes.decoder(inputs[-1], image, 1, squares)
    for stage, before in zip(reversed(passes.encoder.stages), reversed(inputs[:-1])):
        pulls = passes.stage(stage, before, pulls, squares)
    assert set(squares) == {name for name, gradient in zip(whole, gradients) if gradient is not None}
    assert any(name.startswith("vision_encoder.") for name in squares)
    for layer, gradient in zip(whole, gradients):
        if gradient is not None:
            expected = gradient.square().sum(1 if passes.is_map[layer] else -1)
            # Squares of float32 gradients that were summed in another order.
            torch.testing.assert_close(squares[layer], expected, rtol=2e-2, atol=1e-3 * expected.max().item())


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_have_mean_one_and_the_shape_of_the_outputs_rows(name):
    model, sites, data = subject(name)
    weights = found(name)
    decoder = {site.name for site in sites.layers if site.name.startswith(sites.decoder)}
    assert decoder <= set(weights.rows)
    seen = {}
    handles = [
        model.get_submodule(layer).register_forward_hook(
            lambda _m, args, _o, layer=layer: seen.update({layer: args[0]})
        )
        for layer in weights.rows
    ]
    family_of(model).forward(model, data.images[1])
    for handle in handles:
        handle.remove()
    for layer, each in weights.rows.items():
        own = weights.weights(layer, 1)
        # float16 keeps three digits.
        assert own.min() >= 0 and own.mean().item() == pytest.approx(1, abs=5e-3), layer
        assert len(each) == len(data.images)
        module = QuantizedLayer(copy.deepcopy(model.get_submodule(layer)), 16, ActivationQuantizer(16))
        assert sampled_rows(own, 100).shape[0] == rows_of(module, seen[layer], 100).shape[1], layer


def test_an_object_of_a_few_pixels_counts_as_much_as_one_that_fills_the_image():
    # Masks of 4 and of 4096 of 16384 places, with one gradient a place: summed over places, both pull alike.
    logits = torch.full((2, 1, 128, 128), -20.0)
    logits[0, 0, :2, :2] = 3.0
    logits[1, 0, :64, :64] = 3.0
    squares = torch.zeros(2)
    torch.manual_seed(0)
    for _ in range(20):
        leaf = logits.clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(sensitivity.relative_pull(leaf, torch.zeros(2, 1)), [leaf])
        squares += gradient.square().sum((1, 2, 3))
    # A sum of 80 squared normals is 16 % off, one standard deviation; unweighed the ratio would be 1024.
    assert 0.5 < (squares[0] / squares[1]).item() < 2.0


def test_the_decoder_alone_is_asked_unless_the_encoder_is_too():
    _, sites, _ = subject("sam")
    alone = found("sam", encoder=False)
    assert alone.rows and all(layer.startswith(sites.decoder) for layer in alone.rows)
    assert alone.weights("vision_encoder.layers.0.mlp.lin1", 0) is None


def test_shares_are_checked_and_mix_with_plain_errors():
    rows = {"layer": [torch.tensor([[0.0, 2.0]]).half()]}
    assert torch.equal(MaskSensitivity(rows, 0.5).weights("layer", 0), torch.tensor([[0.5, 1.5]]))
    for wrong in ({"share": 1.5}, {"draws": 0}):
        with pytest.raises(ConfigError, match=r"must lie in \[0, 1\]"):
            SensitivitySettings(**wrong)
    with pytest.raises(ConfigError, match=r"set masks\.share"):
        SensitivitySettings(share=0.0, encoder=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_that_are_known_are_not_computed_again(name, monkeypatch):
    model, sites, data = subject(name)
    asked = {"share": 1.0}
    wanted = mask_sensitivity(model, sites, data, SensitivitySettings(**asked))
    with remembered(model) as known:
        for image in data.images[1:]:
            encode_image(model, image.pixel_values)
    held = data.with_embeddings(known)
    assert [each is None for each in held.embeddings] == [True, False, False] and data.embeddings == ()
    assert held.fingerprint == data.fingerprint
    with torch.no_grad():
        held = held.with_first_embeddings([encode_image(model, data.images[0].pixel_values)])
    monkeypatch.setattr(sensitivity._Passes, "forwards", None)
    found = mask_sensitivity(model, sites, held, SensitivitySettings(**asked))
    assert found.rows.keys() == wanted.rows.keys()
    for layer, rows in wanted.rows.items():
        for given, expected in zip(found.rows[layer], rows):
            # Half precision: of the embeddings kept, and of the weights.
            torch.testing.assert_close(given.float(), expected.float(), rtol=0.1, atol=0.02)


def test_the_refit_serves_the_rows_that_count():
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    layer.weight.requires_grad_(False), layer.bias.requires_grad_(False)
    # Two kinds of rows, which need different biases: what quantized inputs lose is the opposite of one another.
    floating = [torch.randn(1, 40, 4, generator=generator) for _ in range(8)]
    sign = torch.where(torch.arange(40) < 20, 1.0, -1.0)[None, :, None]
    quantized = [x + 0.5 * sign for x in floating]
    counts = torch.where(torch.arange(40) < 20, 2.0, 0.0)[None]

    def error(weights):
        model = torch.nn.Module()
        model.layer = QuantizedLayer(copy.deepcopy(layer), 16, ActivationQuantizer(16))
        rows = FloatRows(model, ["layer"], len(floating))
        with rows.watching():
            for x in floating:
                model.layer(x)
        passes = QuantizedPasses(model, ["layer"], [lambda x=x: model.layer(x) for x in quantized])
        refit_layers(model, passes, rows.rows, RefitSettings(), feedback=False, weights=weights)
        with simulate(weights=True, activations=True):
            missing = [model.layer(x) - layer(y) for x, y in zip(quantized, floating)]
        return sum((each.square() * counts[..., None]).sum().item() for each in missing)

    plain, weighed = error(lambda *_: None), error(lambda _name, _index: counts)
    assert weighed < 0.1 * plain


def test_a_video_has_no_masks_to_differentiate_and_the_report_says_so():
    model = small_model("sam2_video")
    side = family_of(model).image_size(model)
    images = [PromptedImage("0", torch.randn(1, 3, side, side), torch.tensor([[4.0, 4.0, 40.0, 50.0]]))]
    settings = {"learn": False, "refit": {"enabled": False}, "equivalences": {"map_steps": 0, "images": 1}}
    settings["masks"] = {"share": 0.9}
    method = create("car-sam-plus", settings)
    sites = find_sites(model)
    data = sites.family.calibration_data(model, CalibrationSet.of(images))
    choices = method.choose(model, sites, data, BitPlan.parse("w4a4"))
    assert choices.sensitivity is None
    assert any("cannot be differentiated" in report.get("refused", "") for report in choices.reports)


def test_a_share_of_zero_asks_nothing_and_gives_the_plain_quantization():
    model, _, data = subject("sam")
    changes = {"learn": False, "equivalences": {"map_steps": 0, "smoothing": [], "shift": False, "observers": []}}
    plain, weighed = (
        quantize(model, data, QuantizeConfig("car-sam-plus", {**changes, "masks": {"share": share}})).model
        for share in (0.0, 0.9)
    )
    states = plain.state_dict(), weighed.state_dict()
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_of_encoder_stages_are_weighed_as_their_units_give_them(name):
    model, sites, _ = subject(name)
    weights = found(name)
    units = {unit.stage: unit for unit in family_of(model).units(sites, "encoder")}
    assert bool(weights.outputs) or name == "sam2"
    for stage, each in weights.outputs.items():
        (own,) = each.batch([0, 2], torch.device("cpu"))
        assert own.shape[0] == 2 and own.min() >= 0
        # Positions times channels, both of mean one.
        assert own.mean().item() == pytest.approx(1, abs=1e-2)
        assert own.shape[units[stage].channel_dim] == own.shape[each.channel_dim] > 1
