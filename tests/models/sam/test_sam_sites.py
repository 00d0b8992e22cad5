"""Sites, bit plans, and the quantized attentions."""

import copy

import pytest
import torch
from torch import nn

from carsam.bits.plan import BitPlan, Bits
from carsam.config import QuantizeConfig
from carsam.errors import CheckpointError, ConfigError
from carsam.methods.base import Method
from carsam.models.family import find_sites
from carsam.models.forward import encode_image
from carsam.models.prepare import prepare_model
from carsam.quantizers import ActivationQuantizer, QuantizedLayer, simulate


def test_sites_are_every_layer_that_the_specification_names(nano):
    sites = find_sites(nano)
    found = {site.name for site in sites.layers}
    expected = {
        name
        for name, module in nano.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and (name.startswith(("vision_encoder.layers", "vision_encoder.neck", "mask_decoder.transformer")))
    }
    assert found == expected and len(sites.layers) == len(found)
    assert len(sites.attentions) == 8 + 2 * 3 + 1


def test_other_models_are_refused():
    with pytest.raises(CheckpointError, match="Linear is not supported"):
        find_sites(nn.Linear(2, 2))


@pytest.mark.parametrize("text", ["4", "w4", "w4a4a4", "w1a4", "w4a9", "int4", "w16a3b"])
def test_bits_that_do_not_exist_are_refused(text):
    with pytest.raises(ConfigError):
        Bits.parse(text)


def test_overrides_match_layers_inputs_and_operands_last_one_wins():
    plan = BitPlan.parse("w4a4", {"mask_decoder.*": "w8a8", "*.probs": "w4a6", "*.mlp.lin2": "w5a7"})
    assert plan.weight_bits("vision_encoder.neck.conv1") == 4
    for layer, weights, activations in (("mask_decoder.x.mlp.lin1", 8, 8), ("mask_decoder.x.mlp.lin2", 5, 7)):
        assert plan.weight_bits(layer) == weights and plan.activation_bits(f"{layer}.input") == activations
    assert plan.activation_bits("mask_decoder.x.probs") == 6


def test_an_override_that_matches_nothing_is_an_error(nano):
    with pytest.raises(ConfigError, match="matches no site"):
        BitPlan.parse("w4a4", {"*.decoder.*": "w8a8"}).check(find_sites(nano))


def test_config_round_trip_and_unknown_keys():
    config = QuantizeConfig(bits="w6a6", settings={"granularity": "block"}, overrides={"*.probs": "w4a8"})
    assert QuantizeConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="n_images"):
        QuantizeConfig.from_dict({"calibration": {"images_count": 3}})


def prepared(nano, bits, softmax="uniform"):
    model = copy.deepcopy(nano)
    method = Method(softmax=softmax)
    prepare_model(model, find_sites(model), BitPlan.parse(bits), method.quantizer_for, method.softmax_for)
    return model


@torch.no_grad()
@pytest.mark.parametrize("softmax", ["uniform", "row-max"])
@pytest.mark.parametrize("chunk", [2**25, 49 * 49 * 4, 1000])
def test_outputs_are_the_float_models_while_nothing_is_simulated(nano, softmax, chunk, monkeypatch):
    """Also in pieces of some heads and of some rows of one head's map, as large attentions run."""
    monkeypatch.setattr("carsam.models.attention.CHUNK_ELEMENTS", chunk)
    model = prepared(nano, "w4a4", softmax)
    g = torch.Generator().manual_seed(0)
    inputs = {
        "pixel_values": torch.randn(1, 3, 256, 256, generator=g),
        "input_boxes": torch.tensor([[[20.0, 30.0, 120.0, 140.0], [5.0, 5.0, 250.0, 200.0]]]),
    }
    expected, got = nano(**inputs), model(**inputs)
    torch.testing.assert_close(got.pred_masks, expected.pred_masks, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.iou_scores, expected.iou_scores, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_float_model_with_large_maps_attends_in_pieces(nano, monkeypatch):
    monkeypatch.setattr("carsam.models.sam.encoder.CHUNK_ELEMENTS", 0)
    monkeypatch.setattr("carsam.models.attention.CHUNK_ELEMENTS", 1000)
    model = copy.deepcopy(nano)
    find_sites(model).family.compute_in_pieces(model)
    changed = [block.window_size for block in model.vision_encoder.layers if hasattr(block.attn, "matmul")]
    assert changed == [0] * sum(block.window_size == 0 for block in nano.vision_encoder.layers) != []
    assert model.state_dict().keys() == nano.state_dict().keys()
    pixels = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encode_image(model, pixels), encode_image(nano, pixels), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_changing_the_attention_implementation_does_not_switch_quantization_off(nano):
    model = prepared(nano, "w16a4")
    model.set_attn_implementation("sdpa")
    with simulate(activations=True), pytest.raises(RuntimeError, match="calibration"):
        model.mask_decoder.transformer.layers[0].self_attn(*[torch.zeros(1, 1, 3, 256)] * 3)


def test_sixteen_bits_leave_a_site_alone(nano):
    model = prepared(nano, "w16a16")
    assert not [m for m in model.modules() if isinstance(m, ActivationQuantizer) and list(m.buffers())]
    layer = next(m for m in model.modules() if isinstance(m, QuantizedLayer))
    layer.fit_weight()
    layer.freeze()
    assert layer.codes is None
