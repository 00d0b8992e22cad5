"""The contract that every registered method fulfils; a new method is tested here without an edit."""

import copy
import functools
import json

import pytest
import torch
from safetensors import safe_open

import carsam
from carsam.config import QuantizeConfig
from carsam.errors import ConfigError
from carsam.methods.base import create, registry
from carsam.models.family import find_sites
from carsam.models.prepare import prepare_model
from carsam.pack.layers import PackedLayer
from carsam.quantizers import activation_grids, softmax_grids
from carsam.reconstruct.units import check_cover

METHODS = sorted(registry())


def short(name):
    """The method with the fewest steps and no searched ranges: everything is gone through, in seconds."""
    has_steps = hasattr(create(name), "reconstruction")
    ranges = {"weight_observer": "min-max", "activation_observer": "min-max"}
    few = {"reconstruction": {"steps": 2, "decoder_steps": 2}} if has_steps else {}
    if hasattr(create(name), "tuning"):
        few["tuning"] = {"steps": 2}
    if hasattr(create(name), "refit"):
        few |= {
            "refit": {"damping": 0.1},
            "equivalences": {"foldings": ["centre values"], "smoothing": [0.5], "observers": [], "map_steps": 4},
        }
    return {**ranges, **few}


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


@pytest.fixture(scope="module")
def packed(nano, small_set, tmp_path_factory):
    """Packed folders by method, each made once; read-only."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name) / "packed"
        carsam.quantize(nano, small_set, QuantizeConfig(method=name, settings=short(name)), out=folder)
        return folder

    return make


@pytest.mark.parametrize("name", METHODS)
def test_quantizes_packs_and_holds_integers_only(name, nano, packed):
    before = {key: value.clone() for key, value in nano.state_dict().items()}
    model = carsam.load(packed(name))
    assert all(torch.equal(value, before[key]) for key, value in nano.state_dict().items()), "the input was changed"

    sites = find_sites(model)
    for site in sites.layers:
        layer = model.get_submodule(site.name)
        assert isinstance(layer, PackedLayer)
        codes = layer.dequantized_weight().flatten(1) / layer.weight_scale[:, None] + layer.weight_zero_point[:, None]
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
        assert codes.min() > -0.01 and codes.max() < 15.01
    with safe_open(packed(name) / "model.safetensors", "pt") as file:
        stored = [file.get_slice(f"{site.name}.weight").get_dtype() for site in sites.layers]
    assert set(stored) == {"U8"}


@pytest.mark.parametrize("name", METHODS)
def test_activations_lie_on_grids_that_the_file_names_and_the_row_admits(name, packed, small_set):
    model = carsam.load(packed(name))
    config = json.loads((packed(name) / "config.json").read_text())["quantization_config"]
    inputs = {path: spec["input"] for path, spec in config["layout"]["layers"].items()}
    noted = {activation_grids()[spec["grid"]].note for spec in inputs.values()}
    for attention in config["layout"]["attentions"].values():
        noted |= {activation_grids()[spec["grid"]].note for which, spec in attention.items() if which != "probs"}
        noted.add(softmax_grids()[attention["probs"]["grid"]].note)
    assert bool(noted - {""}) == bool(create(name).notes), "a row with other grids must say so, and only such a row"

    seen = {}
    for path, spec in inputs.items():
        quantizer = model.get_submodule(path).input_quantizer
        assert quantizer.spec() == spec
        quantizer.register_forward_hook(lambda q, args, out, path=path: seen.update({path: (q, args[0], out)}))
    image = small_set.images[0]
    with torch.no_grad():
        model(pixel_values=image.pixel_values, input_boxes=image.boxes[None], multimask_output=False)
    assert seen.keys() == inputs.keys()
    for path, (quantizer, values, out) in seen.items():
        codes = quantizer.encode(values)
        assert int(codes.max()) < 16
        torch.testing.assert_close(quantizer.decode(codes), out, rtol=1e-4, atol=1e-5, msg=path)


@pytest.mark.parametrize("name", [name for name in METHODS if hasattr(create(name), "reconstruction")])
def test_interrupted_and_resumed_it_gives_what_it_would_have_given(name, nano, small_set, packed, tmp_path):
    config = QuantizeConfig(method=name, settings=short(name))

    def interrupt(unit, n_units, *_):
        if unit == n_units // 2:
            raise KeyboardInterrupt

    out = tmp_path / "packed"
    with pytest.raises(KeyboardInterrupt):
        carsam.quantize(nano, small_set, config, out=out, progress=interrupt)
    assert not out.exists()
    finished = len(list(out.with_name("packed.partial").glob("*.safetensors")))
    assert finished > 0
    computed = set()

    def watch(unit, n_units, unit_name, step, n_steps):
        if step:
            computed.add(unit_name)

    resumed = carsam.quantize(nano, small_set, config, out=out, resume=True, progress=watch)
    # What is tuned after the units is not kept.
    computed &= {unit.unit for unit in resumed.report.units}
    assert len(computed) == len(resumed.report.units) - finished, "finished units were computed again"
    assert (out / "model.safetensors").read_bytes() == (packed(name) / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "settings", "notes"),
    [
        ("ptq4sam-s", {"softmax": "uniform"}, "BIG by all calibration images"),
        ("ptq4sam-s", {"softmax": "uniform", "bimodal_rule": "published"}, ""),
        ("rtn", {"softmax": "log2"}, "P in log2 codes"),
        (
            "ahcptq",
            {"hybrid": False, "softmax": "uniform", "bimodal_rule": "published"},
            "projections per group of input channels",
        ),
        (
            "ahcptq",
            {"hybrid": False, "softmax": "uniform", "bimodal_rule": "published", "merged_by": "error"},
            "projections per group of input channels, merged by least error",
        ),
        ("ahcptq", {"hybrid": False, "groups": 1, "bimodal_integration": False}, "P in log2 codes"),
        (
            "ptq4sam-l",
            {"extra_code": True, "bimodal_rule": "published"},
            "P in log2 codes and one code too many",
        ),
    ],
)
def test_notes_follow_the_settings(name, settings, notes):
    assert create(name, settings).notes == notes


def test_unknown_method_names_the_choices():
    with pytest.raises(ConfigError, match="car-sam"):
        create("carsam")
