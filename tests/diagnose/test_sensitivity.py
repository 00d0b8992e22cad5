"""Sites one by one: what is swapped, what it costs, and that nothing stays changed."""

import copy

import pytest
import torch

from carsam.calibrate.site_errors import parts_by_stage, swapped
from carsam.diagnose.measures import RelativeError
from carsam.diagnose.pair import round_to_nearest
from carsam.diagnose.sensitivity import sensitivity
from carsam.predict.predictor import predict_logits
from carsam.prompts.calibration import CalibrationSet
from carsam.quantizers import simulate


@pytest.fixture(scope="module")
def models(pair, samples):
    """The float form and its nearest rounding."""
    return round_to_nearest(pair, CalibrationSet.of(samples[:1]))


def test_every_site_once_in_execution_order(models, pair):
    parts = [part for parts in parts_by_stage(models[1], pair.sites).values() for part in parts]
    assert sorted(part.site for part in parts) == sorted(pair.sites.names)
    assert {part.bits for part in parts} == {4}
    assert [part.site.removeprefix("vision_encoder.layers.0.attn.") for part in parts[:8]] == [
        *("qkv.input", "qkv", "query", "key", "value", "probs", "proj.input", "proj"),
    ]
    assert all((part.kind == "weight") == (part.attribute == "weight") for part in parts)


def test_sites_alone(models, pair, samples, nano, monkeypatch):
    """Some sites against the float model with that one weight or activation rounded by hand."""
    base, rounded = models
    chosen = {
        "vision_encoder.layers.6.mlp.lin2",
        "vision_encoder.layers.7.attn.qkv.input",
        "mask_decoder.transformer.final_attn_token_to_image.probs",
        "mask_decoder.transformer.layers.0.mlp.lin1",
    }

    def some(model, sites):
        found = parts_by_stage(model, sites)
        return {stage: [part for part in parts if part.site in chosen] for stage, parts in found.items()}

    monkeypatch.setattr("carsam.calibrate.site_errors.parts_by_stage", some)
    before = copy.deepcopy(base.state_dict())
    done = []
    sample = samples[0]
    results = {
        each.site: each for each in sensitivity(base, rounded, pair.sites, samples[:1], lambda *n: done.append(n))
    }
    assert set(results) == chosen
    assert done == [(n, 4) for n in (1, 2, 3, 4)]
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name])

    height, width = (size // 4 for size in sample.geometry.input_size)

    def logits(model):
        embedding = model.get_image_embeddings(sample.pixel_values)
        return predict_logits(model, embedding, boxes=sample.boxes)[0][:, 0, : height + 1, :width]

    with torch.no_grad():
        target = logits(nano)
        for name in ("vision_encoder.layers.6.mlp.lin2", "mask_decoder.transformer.layers.0.mlp.lin1"):
            changed = copy.deepcopy(nano)
            changed.get_submodule(name).weight.copy_(rounded.get_submodule(name).weight)
            error = RelativeError()
            error.update(logits(changed), target)
            assert results[name].error == pytest.approx(error.value, rel=0.02)
        changed = copy.deepcopy(nano)
        quantizer = rounded.get_submodule("vision_encoder.layers.7.attn.qkv").input_quantizer
        changed.vision_encoder.layers[7].attn.qkv.register_forward_pre_hook(lambda _m, args: quantizer(*args))
        with simulate(activations=True):
            error = RelativeError()
            error.update(logits(changed), target)
        assert results["vision_encoder.layers.7.attn.qkv.input"].error == pytest.approx(error.value, rel=0.02)
    for each in results.values():
        assert each.error > 0
        assert 0 < each.iou <= 1


def test_swapping_ends_with_the_block(models, pair):
    base, rounded = models
    part = next(
        part for parts in parts_by_stage(rounded, pair.sites).values() for part in parts if part.kind == "weight"
    )
    layer = base.get_submodule(part.owner)
    weight = layer.weight
    with pytest.raises(KeyboardInterrupt), swapped(base, rounded, part):
        assert layer.weight is rounded.get_submodule(part.owner).weight
        raise KeyboardInterrupt
    assert layer.weight is weight
