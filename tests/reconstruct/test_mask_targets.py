"""What the masks make of a unit's errors, and the decoder tuned on them, on the embedded model."""

import pytest
import torch

from carsam.calibrate.cache import CacheSpace, cached, variances
from carsam.config import QuantizeConfig
from carsam.errors import ConfigError
from carsam.models.family import find_sites
from carsam.pipeline import quantize
from carsam.quantizers import SiteQuantizer
from carsam.reconstruct.losses import relative_loss
from carsam.reconstruct.masks import decoded, leaves, mask_weights
from carsam.reconstruct.optimize import ReconstructionSettings
from carsam.reconstruct.units import decoder_units

CPU = torch.device("cpu")
# Tokens of a box prompt in their order: predicted IoU, the mask of a single-mask prediction, three more masks, corners.
IOU, SINGLE, OTHERS = 0, 1, slice(2, 5)


@pytest.fixture(scope="module")
def walked(nano, small_set):
    """The float model's embeddings, and by granularity the decoder's units with their float inputs and outputs."""
    sites = find_sites(nano)
    space = CacheSpace()
    encoded = cached(space, ({"hidden_states": nano.vision_encoder(i.pixel_values)[0]} for i in small_set.images))

    def reached(unit, stage, item):
        return item if unit.scope == (stage.name,) else unit.capture(nano, lambda: stage.run(nano, item))

    def targets(unit, granularity):
        _, decoder = sites.family.parts(sites, granularity)

        def output(index):
            item = decoder.enter(nano, encoded.get(index, CPU), small_set.images[index])
            for stage in decoder.stages:
                if stage.name == unit.stage:
                    return unit.run(nano, reached(unit, stage, item))
                outputs = stage.run(nano, item)
                item = outputs if stage.following is None else stage.following(nano, item, outputs)

        return cached(space, (output(index) for index in range(len(small_set.images))))

    return sites, encoded, targets


def weights_of(nano, small_set, walked, unit, granularity):
    sites, encoded, targets = walked
    outputs = targets(unit, granularity)
    options = {"space": CacheSpace(), "device": CPU, "seed": 0}
    spread = variances(outputs)
    return mask_weights(nano, unit, outputs, spread, encoded, small_set.images, sites.family, **options), outputs


@pytest.mark.parametrize("granularity", ["module", "pair", "block", "decoder"])
def test_weights_have_the_shape_of_the_outputs_and_mean_one(nano, small_set, walked, granularity):
    for unit in decoder_units(walked[0], granularity):
        weights, outputs = weights_of(nano, small_set, walked, unit, granularity)
        assert sum(weights.shares) == pytest.approx(len(outputs.names))
        for weight, output in zip(weights.batch([1], CPU), outputs.get(1, CPU).values()):
            assert torch.broadcast_shapes(weight.shape, output.shape) == output.shape
            assert (weight >= 0).all()
        # float16 holds positions: half a thousandth of rounding each.
        for positions in weights.positions.get(0, CPU).values():
            assert positions.mean().item() == pytest.approx(1, rel=1e-2)


def test_masks_ignore_the_tokens_of_masks_that_nobody_asked_for(nano, small_set, walked):
    *_, final = decoder_units(walked[0], "pair")
    weights, _ = weights_of(nano, small_set, walked, final, "pair")
    (tokens,) = weights.batch([0], CPU)
    assert (tokens[:, 0, OTHERS] == 0).all()
    assert (tokens[:, 0, [IOU, SINGLE]].sum(-1) > 0).all()


def test_weighted_errors_tell_what_happens_to_the_masks(nano, small_set, walked):
    """An error where the weights are large changes the masks more than the same error where they are small."""
    sites, encoded, _ = walked
    unit = next(unit for unit in decoder_units(sites, "pair") if unit.name.endswith("1.pair"))
    weights, _ = weights_of(nano, small_set, walked, unit, "pair")
    image, index = small_set.images[0], 1  # of its outputs, the image embedding
    weight = weights.positions.get(0, CPU)["keys"]
    order = weight.flatten(1).argsort(1)
    changes = []
    with torch.no_grad():
        exact = torch.sigmoid(decoded(sites.family, nano, encoded.get(0, CPU), image)[0])
        for chosen in (order[:, :64], order[:, -64:]):
            mask = torch.zeros_like(weight.flatten(1)).scatter_(1, chosen, 1.0).view(weight.shape)
            handle = nano.get_submodule(unit.outputs[index]).register_forward_hook(lambda m, a, out, e=mask: out + e)
            found = torch.sigmoid(decoded(sites.family, nano, encoded.get(0, CPU), image)[0])
            handle.remove()
            changes.append((found - exact).square().sum().item())
    assert changes[1] > 5 * changes[0]


def test_the_reference_is_left_as_it_was(nano, small_set, walked):
    unit = decoder_units(walked[0], "pair")[1]
    with leaves(nano, unit, 2, {}):
        pass
    assert not any(module._forward_hooks for module in nano.modules())


def test_loss_counts_errors_by_their_weights():
    target = torch.zeros(1, 1, 2, 3)
    output = torch.tensor([[[[1.0, 1, 1], [2, 2, 2]]]])
    plain = relative_loss((output,), (target,), [1.0])
    assert relative_loss((output,), (target,), [1.0], weights=[torch.ones(1, 1, 2, 1)]) == plain
    first = relative_loss((output,), (target,), [1.0], weights=[torch.tensor([[[[2.0], [0.0]]]])])
    assert first == pytest.approx(3 * 2 * 3 / 6)


def quantized(nano, small_set, **reconstruction):
    settings = {"reconstruction": {"decoder_steps": 2, **reconstruction}, "mac": {"query": False, "key": False}}
    fast = {"weight_observer": "min-max", "activation_observer": "min-max"}
    config = QuantizeConfig(method="car-sam", decoder_only=True, settings={**settings, **fast})
    return quantize(nano, small_set, config)


@pytest.mark.parametrize("norms", [False, True])
def test_tuning_lowers_the_loss_of_images_that_judge_and_leaves_the_integers(nano, small_set, norms):
    plain = quantized(nano, small_set)
    tuned = quantized(nano, small_set, mask_steps=12, mask_norms=norms)
    report = tuned.report.masks
    assert plain.report.masks is None
    assert report.after < report.before
    assert 0 < report.best <= report.steps == 12
    before, after = plain.model.state_dict(), tuned.model.state_dict()
    changed = {name.rsplit(".", 1)[-1] for name in before if not torch.equal(before[name], after[name])}
    assert "scale" in changed
    assert not changed & {"codes", "packed", "weight_scale", "weight_zero_point", "zero_point"}
    assert bool(changed & {"bias", "weight"}) == norms
    assert all(m.learned is None for m in tuned.model.modules() if isinstance(m, SiteQuantizer))


@pytest.mark.parametrize("settings", [{"mask_weight": 1.5}, {"mask_steps": -1}, {"mask_rate": 0.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match="mask"):
        ReconstructionSettings(**settings)


def test_a_family_without_such_a_pass_is_refused(nano, small_set, walked):
    sites, encoded, _ = walked

    class Other(type(sites.family)):
        name = ""

        def decode(self, model, encoded, image):
            return None

    with pytest.raises(ConfigError, match="mask_steps"):
        decoded(Other(), nano, encoded.get(0, CPU), small_set.images[0])


@pytest.mark.parametrize("asked", [{"mask_weight": 1.0}, {"mask_steps": 2}])
def test_a_family_without_such_a_pass_is_quantized_where_masks_are_optional(
    nano, small_set, walked, asked, monkeypatch, caplog
):
    monkeypatch.setattr(type(walked[0].family), "decode", lambda *_: None)
    with pytest.raises(ConfigError, match="cannot be tuned on their masks"):
        quantized(nano, small_set, **asked)
    found = quantized(nano, small_set, **asked, mask_optional=True).model
    assert caplog.text.count("cannot be differentiated") == 1
    plain = quantized(nano, small_set).model.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in found.state_dict().items())


def test_decode_is_what_prediction_computes(nano, small_set, walked):
    sites, encoded, _ = walked
    image = small_set.images[0]
    with torch.no_grad():
        logits, scores = decoded(sites.family, nano, encoded.get(0, CPU), image)
        expected, iou = sites.family.predict_logits(nano, encoded.get(0, CPU)["hidden_states"], boxes=image.boxes)
    # Prompts in another dimension: sums in another order.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(scores, iou, rtol=1e-4, atol=1e-4)
