"""The contract that every family fulfils; a new family is tested here with its small model (``small_models.py``)."""

import copy
import json

import pytest
import torch
from small_models import image_model, small_model
from torch import Tensor

import carsam
from carsam.calibrate.capture import capture_call
from carsam.config import QuantizeConfig
from carsam.methods.base import create, registry
from carsam.models.attention import MatMulQuantizers
from carsam.models.family import ENCODED, ENCODER, GRANULARITIES, families, family_of, family_of_type, find_sites
from carsam.models.forward import encode_image, predict_logits
from carsam.models.names import names_of_type
from carsam.models.sites import OPERANDS
from carsam.pack.layers import PackedLayer
from carsam.prompts.calibration import CalibrationSet
from carsam.prompts.image import PromptedImage
from carsam.quantizers import ActivationQuantizer, UniformSoftmax
from carsam.reconstruct.units import check_cover, decoder_units, encoder_units

FAMILIES = sorted(families())


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    """Read-only."""
    return small_model(name)


@pytest.fixture(scope="module")
def data(model):
    """Two images of noise with two boxes each."""
    side = family_of(model).image_size(model)
    generator = torch.Generator().manual_seed(0)
    images = []
    for index in range(2):
        corners = torch.rand(2, 2, 2, generator=generator).sort(dim=1).values * (side - 1)
        pixels = torch.randn(1, 3, side, side, generator=generator)
        images.append(PromptedImage(str(index), pixels, corners.flatten(1)))
    return CalibrationSet.of(images)


def tensors(outputs):
    """The tensors of a module's output, which may be one or several with other things; none of a neck's pyramid."""
    return [outputs] if isinstance(outputs, Tensor) else [each for each in outputs if isinstance(each, Tensor)]


def same(ours, theirs, atol=1e-5):
    """Whether tensors hold the same numbers in the same order: prompts may lie along another dimension."""
    assert len(ours) > 0
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine.flatten(), other.flatten(), atol=atol, rtol=1e-4)


def walk(family, model, image, granularity):
    """(stage, inputs, outputs) of a pass, stage by stage."""
    before = {}
    for part in family.parts(find_sites(model), granularity):
        values = part.enter(model, before, image)
        for stage in part.stages:
            outputs = stage.run(model, values)
            yield stage, values, outputs
            values = outputs if stage.following is None else stage.following(model, values, outputs)
        before = outputs


def test_it_is_told_apart_and_described(name, model):
    family = family_of(model)
    assert family.name == name and family == families()[name]
    assert isinstance(model, family.model_class)
    config = json.loads(model.config.to_json_string(use_diff=False))
    assert family_of_type(config["model_type"]) == family
    assert type(names_of_type(config["model_type"])) is type(family.names)
    state = model.state_dict()
    assert family.anchor in state and set(family.untouched) <= set(state)
    assert json.loads(json.dumps(family.architecture(model)))
    assert family.find_state({"weights": torch.zeros(1)}, "a file") is None
    family.check_declared(config, {key: tuple(value.shape) for key, value in state.items()}, "the model")
    assert family.too_large(model.config, [site.name for site in find_sites(model).layers]) == ""


def test_sites_are_in_the_model(model):
    sites = find_sites(model)
    modules = dict(model.named_modules())
    assert all(isinstance(modules[site.name], torch.nn.Linear | torch.nn.Conv2d) for site in sites.layers)
    for site in sites.attentions:
        assert modules[site.name].num_attention_heads > 0
        for projection in (site.query, site.key, site.value):
            layer = modules[projection.layer]
            assert layer.out_features % projection.parts == 0 and projection.part < projection.parts
        assert isinstance(modules[site.output], torch.nn.Linear)
        assert all(isinstance(getattr(modules[site.name], position), Tensor) for position in site.positions)
    assert len(set(sites.names)) == len(sites.names)
    assert {*sites.encoder_stages, *sites.memory_stages, *sites.decoder_stages, sites.decoder} <= set(modules)
    for site in (*sites.layers, *sites.attentions):
        before = (*sites.encoder_stages, *sites.memory_stages)
        inside = [stage for stage in before if site.name.startswith(f"{stage}.")]
        assert len(inside) == (0 if sites.in_decoder(site.name) else 1)
    for norm, reader in sites.readers:
        assert modules[norm].normalized_shape == (modules[reader].in_features,)
    for moment in sites.moments:
        assert {moment.name, moment.output} <= set(modules) and sites.in_decoder(moment.output)
    parts = {moment.name for moment in sites.moments}
    assert {part for pair in sites.neighbours for part in pair} <= parts and set(sites.focus) <= parts


@pytest.mark.parametrize("granularity", ["module", "decoder"])
@torch.no_grad()
def test_stages_in_order_are_the_model(model, data, granularity):
    """Image embedding, tokens and whatever else a stage gives, to five digits."""
    family, image = family_of(model), data.images[0]
    seen = {}
    stages = list(walk(family, model, image, granularity))
    handles = [
        model.get_submodule(stage.name).register_forward_hook(
            lambda _module, _args, output, path=stage.name: seen.setdefault(path, []).append(tensors(output))
        )
        for stage, _, _ in stages
    ]
    family.forward(model, image)
    for handle in handles:
        handle.remove()
    assert seen.keys() == {stage.name for stage, _, _ in stages}
    sites = find_sites(model)
    for stage, _, outputs in stages:
        calls = seen[stage.name]
        if stage.name in sites.memory_stages:
            # Some of the calls of a clip along the first dimension: the nearest call of each must be the same.
            for index, value in enumerate(outputs.values()):
                given = torch.stack([call[index].flatten() for call in calls])
                for row in value:
                    nearest = (given - row.flatten()).square().sum(1).argmin()
                    same([row], [given[nearest]])
        # What a neck gives on several levels is one embedding here, which is compared below.
        elif calls[-1]:
            same(list(outputs.values()), calls[-1])
    assert [name for name, given in seen.items() if not given[-1]] in ([], [sites.encoder_stages[-1]])
    embedding = next(outputs for stage, _, outputs in stages if stage.name == sites.encoder_stages[-1])
    same(list(embedding.values()), [encode_image(model, image.pixel_values)])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@torch.no_grad()
def test_units_cover_every_site_once_and_run_as_their_stage_does(model, data, granularity):
    family, sites = family_of(model), find_sites(model)
    units = [*encoder_units(sites), *decoder_units(sites, granularity)]
    check_cover(units, sites)
    assert len({unit.name for unit in units}) == len(units)
    assert [unit.stage for unit in family.units(sites, ENCODER)] == list(sites.encoder_stages)
    run = 0
    for stage, inputs, outputs in walk(family, model, data.images[1], granularity):
        for unit in (unit for unit in units if unit.stage == stage.name):
            captured = unit.capture(model, lambda stage=stage, inputs=inputs: stage.run(model, inputs))
            found = list(unit.run(model, captured).values())
            if unit.scope == (stage.name,):
                expected = list(outputs.values())
            elif len(unit.scope) == 1:
                module = model.get_submodule(unit.scope[0])
                call = lambda stage=stage, inputs=inputs: stage.run(model, inputs)  # noqa: E731
                expected = tensors(capture_call(module, call, output=True))
            else:  # the last part of its stage
                expected = list(outputs.values())
            same(found, expected)
            assert found[0].shape[unit.channel_dim] > 1
            run += 1
    assert run == len(units)


@torch.no_grad()
def test_quantizers_at_the_matmuls_change_nothing_until_they_quantize(model, data):
    family, image = family_of(model), data.images[0]
    changed = copy.deepcopy(model)
    names = ("query", "key", "value", "probs")
    for site in find_sites(changed).attentions:
        matmul = MatMulQuantizers(*(ActivationQuantizer(16) for _ in OPERANDS[:3]), UniformSoftmax(16))
        attention = family.with_matmul(changed.get_submodule(site.name), matmul)
        assert [getattr(attention.matmul, which) for which in names] == [getattr(matmul, which) for which in names]
        parent, _, child = site.name.rpartition(".")
        setattr(changed.get_submodule(parent), child, attention)
    assert changed.state_dict().keys() == model.state_dict().keys()
    embeddings = [encode_image(each, image.pixel_values) for each in (changed, model)]
    same(embeddings[:1], embeddings[1:])
    logits = [predict_logits(each, embeddings[1], boxes=image.boxes)[0] for each in (changed, model)]
    same(logits[:1], logits[1:], atol=1e-4)


@pytest.mark.parametrize("several", [False, True])
@torch.no_grad()
def test_prediction_is_the_models_own(model, data, several):
    family, image = family_of(model), data.images[0]
    points, labels = image.boxes.reshape(2, 2, 2), torch.tensor([[1, 0], [1, 1]])
    prompts = {"input_points": points[None], "input_labels": labels[None], "input_boxes": image.boxes[None]}
    own = image_model(model)(pixel_values=image.pixel_values, **prompts, multimask_output=several)
    embedding = encode_image(model, image.pixel_values)
    logits, scores = predict_logits(
        model, embedding, points=points, labels=labels, boxes=image.boxes, multimask_output=several
    )
    side = family.low_res_size(model)
    assert logits.shape == (2, 3 if several else 1, side, side)
    same([logits, scores], [own.pred_masks[0], own.iou_scores[0]])


# A SAM 2 with memory is the image model with modules that stay in floating point: two methods show as much as all.
LESS = {"sam2_video": {"rtn", "car-sam"}}


def test_eight_bits_are_close_to_floating_point(model, data, tmp_path):
    """Packed and loaded back; four bits of random weights would hide what is wrong."""
    settings = {"weight_observer": "min-max", "activation_observer": "min-max"}
    carsam.quantize(model, data, QuantizeConfig("rtn", settings, "w8a8"), out=tmp_path / "packed")
    packed, image = carsam.load(tmp_path / "packed"), data.images[0]
    with torch.no_grad():
        embeddings = [encode_image(each, image.pixel_values) for each in (model, packed)]
        masks = [predict_logits(each, embeddings[0], boxes=image.boxes)[0] for each in (model, packed)]
    for exact, found in (embeddings, masks):
        # Steps of a 255th of the range, over a dozen layers; anything else wrong gives errors of the order of 1.
        assert (found - exact).square().mean() < 0.02 * exact.var()


@pytest.mark.parametrize("method", sorted(registry()))
def test_every_method_quantizes_it_and_the_folder_comes_back_equal(method, name, model, data, tmp_path):
    if method not in LESS.get(name, {method}):
        pytest.skip("the family that it derives from goes through every method")
    settings = {"weight_observer": "min-max", "activation_observer": "min-max"}
    if hasattr(create(method), "reconstruction"):
        settings["reconstruction"] = {"steps": 2, "decoder_steps": 2}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = carsam.quantize(model, data, QuantizeConfig(method, settings), out=tmp_path / "packed")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the input was changed"
    packed = carsam.load(tmp_path / "packed")
    assert type(packed) is type(model)
    sites = find_sites(packed)
    assert all(isinstance(packed.get_submodule(site.name), PackedLayer) for site in sites.layers)
    image = data.images[0]
    outputs = []
    for each in (result.model, packed, model):
        with torch.no_grad():
            outputs.append(predict_logits(each, encode_image(each, image.pixel_values), boxes=image.boxes)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.isfinite(outputs[1]).all() and not torch.equal(outputs[1], outputs[2])
    packed.save_pretrained(tmp_path / "again")
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("packed", "again")]
    assert weights[0] == weights[1]


def test_decoding_with_gradients_is_prediction(model, data):
    """Where a family decodes with gradients, it gives what prediction gives, and gradients reach the embedding."""
    family, image = family_of(model), data.images[0]
    embedding = encode_image(model, image.pixel_values).detach().requires_grad_()
    found = family.decode(model, {ENCODED: embedding}, image)
    if found is None:
        pytest.skip("the family does not decode with gradients")
    logits, scores = found
    expected, iou = predict_logits(model, embedding.detach(), boxes=image.boxes)
    # Prompts lie along another dimension: sums in another order.
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scores.detach(), iou, rtol=1e-3, atol=1e-3)
    logits.sum().backward()
    assert embedding.grad.abs().sum() > 0
