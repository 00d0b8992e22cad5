"""The contract that every registered method fulfils; a new method is tested here without an edit."""

import copy
import json

import pytest
import torch
from safetensors import safe_open

import carsam
from carsam.config import QuantizeConfig
from carsam.errors import ConfigError
from carsam.methods.base import create, registry
from carsam.models.prepare import prepare_model
from carsam.models.sites import find_sites
from carsam.pack.layers import PackedLayer
from carsam.reconstruct.units import check_cover

METHODS = sorted(registry())


def short(name):
    """The method with the fewest steps that still go through everything."""
    has_steps = hasattr(create(name), "reconstruction")
    return {"reconstruction": {"steps": 2, "decoder_steps": 2}} if has_steps else {}


@pytest.mark.parametrize("name", METHODS)
def test_settings_round_trip_and_unknown_ones_are_refused(name):
    method = create(name)
    assert create(name, json.loads(json.dumps(method.to_dict()))) == method
    assert method.summary
    with pytest.raises(ConfigError, match="unknown setting"):
        create(name, {"no_such_setting": 1})
    with pytest.raises(ConfigError, match="choose from"):
        create(name, {"activation_observer": "median"})


@pytest.mark.parametrize("name", METHODS)
def test_units_cover_every_site(name, nano):
    sites = find_sites(nano)
    units = create(name).units(sites)
    if units:
        check_cover(units, sites)
        json.dumps([create(name).unit_settings(unit, sites) for unit in units])


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_float_output_is_unchanged_while_quantization_is_off(name, nano, small_set):
    method = create(name, short(name))
    model = copy.deepcopy(nano)
    sites = find_sites(model)
    method.transform(model, sites, small_set)
    prepare_model(model, sites, QuantizeConfig().bit_plan(), method.quantizer_for, method.softmax_for)
    image = small_set.images[0]
    inputs = {"pixel_values": image.pixel_values, "input_boxes": image.boxes[None]}
    torch.testing.assert_close(model(**inputs).pred_masks, nano(**inputs).pred_masks, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_quantizes_packs_and_holds_integers_only(name, nano, small_set, tmp_path):
    before = {key: value.clone() for key, value in nano.state_dict().items()}
    config = QuantizeConfig(method=name, settings=short(name))
    result = carsam.quantize(nano, small_set, config, out=tmp_path / "packed")
    assert all(torch.equal(value, before[key]) for key, value in nano.state_dict().items()), "the input was changed"

    sites = find_sites(result.model)
    for site in sites.linears:
        layer = result.model.get_submodule(site.name)
        assert isinstance(layer, PackedLayer)
        codes = layer.dequantized_weight().flatten(1) / layer.weight_scale[:, None] + layer.weight_zero_point[:, None]
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
        assert codes.min() > -0.01 and codes.max() < 15.01
    with safe_open(tmp_path / "packed" / "model.safetensors", "pt") as file:
        packed = [file.get_slice(f"{site.name}.weight").get_dtype() for site in sites.linears]
    assert set(packed) == {"U8"}


def test_unknown_method_names_the_choices():
    with pytest.raises(ConfigError, match="car-sam"):
        create("carsam")
