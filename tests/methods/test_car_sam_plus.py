"""CAR-SAM+ on the small model of every family: nothing changes in floating point, choices are kept, errors fall."""

import copy
import functools
import gc
import logging

import pytest
import torch
from small_models import small_model

import carsam
from carsam.bits.plan import BitPlan, Bits
from carsam.commands.recipe import quantize_config
from carsam.compensate.passes import QuantizedPasses
from carsam.config import QuantizeConfig
from carsam.errors import ConfigError
from carsam.methods import car_sam_plus
from carsam.methods.base import create
from carsam.methods.car_sam_plus import PRESETS
from carsam.models.family import family_of, find_sites
from carsam.pipeline import quantize
from carsam.prompts.calibration import CalibrationSet
from carsam.prompts.image import PromptedImage
from carsam.transform.choice import FOLDINGS
from carsam.transform.operands import Refused

QUICK = {"weight_observer": "min-max", "activation_observer": "min-max"}


@functools.cache
def subject(name):
    """A small model, read-only, and six images of noise with two boxes each."""
    model = small_model(name)
    side, generator = family_of(model).image_size(model), torch.Generator().manual_seed(0)
    images = []
    for index in range(6):
        corners = torch.rand(2, 2, 2, generator=generator).sort(dim=1).values * (side - 1)
        pixels = torch.randn(1, 3, side, side, generator=generator) + index % 3
        images.append(PromptedImage(str(index), pixels, corners.flatten(1)))
    return model, CalibrationSet.of(images)


def logits(model, data):
    with torch.no_grad():
        return torch.cat([model(**image.inputs("cpu")).pred_masks.flatten() for image in data.images])


@pytest.mark.parametrize("name", ["sam", "tinyvit"])
def test_what_is_chosen_leaves_the_float_model_as_it_is(name):
    model, data = subject(name)
    changed, sites = copy.deepcopy(model), find_sites(model)
    settings = {"foldings": list(FOLDINGS)}
    method = create("car-sam-plus", {**QUICK, "equivalences": {**settings, "images": 3, "observers": ["percentile"]}})
    choices = method.choose(changed, sites, data, BitPlan(Bits(4, 4)))
    torch.testing.assert_close(logits(changed, data), logits(model, data), atol=1e-4, rtol=1e-4)
    folded = [report for report in choices.reports if report["transform"] == "foldings"]
    assert [report["attention"] for report in folded] == [site.name for site in sites.attentions]
    assert any(report["kept"] != "none" for report in folded) and all(report["error"] <= 1 for report in folded)
    assert choices.softmax.keys() == {site.name for site in sites.attentions}
    norms = [report for report in choices.reports if report["transform"] == "norm"]
    assert [report["norm"] for report in norms] == [norm for norm, _ in sites.readers]
    refused = [report["norm"] for report in choices.reports if "refused" in report]
    assert refused == [norm for norm, layer in sites.readers if layer in sites.padded]


def test_what_stays_in_floating_point_is_left_alone():
    model, data = subject("sam")
    changed = copy.deepcopy(model)
    choices = create("car-sam-plus", QUICK).choose(changed, find_sites(model), data, BitPlan(Bits(16, 16)))
    assert choices.softmax == {} and choices.reports == []
    assert all(torch.equal(a, b) for a, b in zip(changed.state_dict().values(), model.state_dict().values()))


def test_a_rotation_that_is_forbidden_is_refused_or_noted_and_never_silent(caplog):
    model, data = subject("tinyvit")
    sites = find_sites(model)
    with pytest.raises(Refused, match="depthwise"):
        create("car-sam-plus", {"equivalences": {"rotation": True, "strict": True}}).transform(model, sites, data)
    with caplog.at_level(logging.WARNING):
        reports = create("car-sam-plus", {"equivalences": {"rotation": True}}).transform(model, sites, data)
    assert "depthwise" in reports[0]["refused"] and "depthwise" in caplog.text
    model, data = subject("sam")
    turned = copy.deepcopy(model)
    method = create("car-sam-plus", {"equivalences": {"rotation": True}})
    assert method.transform(turned, find_sites(turned), data)[0]["channels"] == 192
    torch.testing.assert_close(logits(turned, data), logits(model, data), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [pytest.param("sam", marks=pytest.mark.slow), "tinyvit"])
def test_fast_learns_nothing_and_beats_rounding_to_nearest(name):
    model, data = subject(name)
    float_logits = logits(model, data)
    settings = {**PRESETS["fast"], **QUICK, "refit": {"damping": 0.1}, "equivalences": {"images": 3, "observers": []}}
    fast = carsam.quantize(model, data, QuantizeConfig("car-sam-plus", settings))
    nearest = carsam.quantize(model, data, QuantizeConfig("rtn", QUICK))

    def error(result):
        return (logits(result.model, data) - float_logits).square().mean().item()

    assert error(fast) < 0.8 * error(nearest)
    assert all(unit.steps == 0 for unit in fast.report.units)
    refitted = [report.refitted for report in fast.report.compensations]
    assert sorted(refitted) == sorted(site.name for site in find_sites(model).layers)
    layout = fast.model.config.quantization_config.layout["attentions"]
    chosen = {r["attention"]: r["softmax"] for r in fast.report.transforms if r["transform"] == "foldings"}
    assert {path: operands["probs"]["grid"] for path, operands in layout.items()} == chosen


@pytest.mark.parametrize("settings", [{"learn": False}, {"reconstruction": {"steps": 1, "decoder_steps": 1}}])
def test_what_the_refit_of_a_unit_keeps_is_freed_before_the_next(settings):
    model, data = subject("sam")
    few = {"foldings": [], "smoothing": [], "shift": False, "observers": [], "images": 3, "map_steps": 0}
    alive = []

    def progress(unit, n_units, name, step, n_steps):
        if step == 0:
            alive.append(sum(type(each) is QuantizedPasses for each in gc.get_objects()))

    gc.collect()
    gc.disable()  # inputs of a ViT-B's MLPs, 0.4 GB with eight images, wait for no collector
    try:
        config = QuantizeConfig("car-sam-plus", {**QUICK, "equivalences": few, **settings}, decoder_only=True)
        quantize(model, data, config, progress=progress)
    finally:
        gc.enable()
    assert len(alive) > 3 and not any(alive)


def test_learned_units_get_their_spread_back_where_layers_are_fitted(monkeypatch):
    model, data = subject("sam")
    few = {"foldings": [], "smoothing": [], "shift": False, "observers": [], "images": 3, "map_steps": 0}
    steps = {"steps": 2, "decoder_steps": 2, "mask_weight": 0.0}

    def restored(**changes):
        seen = []
        monkeypatch.setattr(car_sam_plus, "restore_layers", lambda _m, passes, *_a, **_k: seen.extend(passes.layers))
        settings = {**QUICK, "equivalences": few, "reconstruction": steps, **changes}
        carsam.quantize(model, data, QuantizeConfig("car-sam-plus", settings, decoder_only=True))
        return sorted(seen)

    decoder = find_sites(model).of_decoder()
    assert restored() == sorted(site.name for site in decoder.layers)
    assert not restored(refit={"spread": 0.0}) and not restored(refit={"weights": False})
    assert not restored(learn=False)  # given back as each layer is rounded


def test_choices_and_tuning_tell_how_far_they_are():
    model, data = subject("sam")

    class Progress:
        stages, units, planned = [], [], []

        def __call__(self, *told):
            self.units.append(told)

        def stage(self, *told):
            self.stages.append(told)

        def expect(self, units):
            self.planned.extend(unit.name for unit in units)

    few = {"foldings": [], "smoothing": [0.5], "shift": False, "images": 3, "map_images": 4, "map_steps": 1}
    settings = {**QUICK, "learn": False, "refit": {"enabled": False}, "equivalences": few}
    settings |= {"masks": {"share": 0.5, "draws": 1}, "tuning": {"steps": 2}}
    carsam.quantize(model, data, QuantizeConfig("car-sam-plus", settings), progress=Progress())
    told = [(done, total) for name, done, total in Progress.stages if name == "choices" and total]
    assert told == [(done, told[0][1]) for done in range(told[0][1] + 1)]
    assert Progress.planned[-1] == "whole model" and len(Progress.planned) == Progress.units[0][1]
    count = len(Progress.planned)
    assert Progress.units[-1] == (count - 1, count, "whole model", 2, 2)


APART = "inputs of depthwise convolutions, if any, per channel; inputs of layers shifted per channel"


def test_a_grid_of_p_that_is_asked_for_is_not_chosen():
    assert create("car-sam-plus").notes == f"P in uniform codes or row-maximum codes or log2 codes; {APART}"
    asked = create("car-sam-plus", {"softmax": "log2"})
    assert asked.grids == ("log2",) and asked.notes == f"P in log2 codes; {APART}"
    assert asked.softmax_for("a.probs", 4).grid == "log2"
    assert (
        create("car-sam-plus", {"depthwise": "tensor", "equivalences": {"softmax": ["uniform"], "shifts": False}}).notes
        == ""
    )


def test_inputs_of_depthwise_convolutions_alone_have_a_step_for_each_channel(tmp_path):
    """Both forms share a folder of finished units, and neither is given the other's."""
    model, data = subject("tinyvit")
    sites = find_sites(model)
    choices = {"images": 2, "smoothing": [], "shift": False, "observers": [], "shifts": False}
    quick = {**QUICK, "learn": False, "tuning": {"steps": 0}, "refit": {"enabled": False}, "equivalences": choices}
    for asked, grid in (("channel", "channel"), ("tensor", "uniform")):
        config = QuantizeConfig("car-sam-plus", {**quick, "depthwise": asked})
        result = quantize(model, data, config, unit_cache=tmp_path)
        layers = result.model.config.quantization_config.layout["layers"]
        for site in sites.layers:
            alone = getattr(model.get_submodule(site.name), "groups", 1) > 1
            assert layers[site.name]["input"]["grid"] == (grid if alone else "uniform")
    with pytest.raises(ConfigError, match="unknown depthwise 'both'; choose from channel, tensor"):
        create("car-sam-plus", {"depthwise": "both"})


def test_inputs_are_shifted_where_that_serves_a_layer_and_never_before_padding(tmp_path):
    """A file keeps them as they are; without the setting no input is shifted."""
    model, data = subject("tinyvit")
    few = {"foldings": [], "smoothing": [], "shift": False, "observers": [], "images": 3, "map_steps": 0}
    settings = {**QUICK, "learn": False, "refit": {"enabled": False}, "equivalences": few}

    def layers(bits="w4a4", **changes):
        config = QuantizeConfig("car-sam-plus", {**settings, "equivalences": {**few, **changes}}, bits)
        result = carsam.quantize(model, data, config)
        return result, result.model.config.quantization_config.layout["layers"]

    result, layout = layers()
    shifted = {path for path, layer in layout.items() if layer["input"]["grid"] == "shifted"}
    reported = {r["site"] for r in result.report.transforms if r["transform"] == "range" and r["observer"] == "shifted"}
    assert {f"{path}.input" for path in shifted} == reported
    # Without a norm in front, channels of a map lie where they lie: some of every kind are shifted.
    kinds = {type(model.get_submodule(path)).__name__ for path in shifted}
    assert kinds == {"Conv2d", "Linear"} and shifted != set(layout)
    for path in shifted:
        layer = model.get_submodule(path)
        assert isinstance(layer, torch.nn.Linear) or (layer.kernel_size == (1, 1) and layer.groups == 1)
    result.model.save_pretrained(tmp_path / "packed")
    loaded = carsam.load(tmp_path / "packed")
    for path in shifted:
        ours, theirs = (each.get_submodule(path).input_quantizer for each in (result.model, loaded))
        assert theirs.shift.shape == (model.get_submodule(path).weight.shape[1],)
        assert torch.equal(ours.shift, theirs.shift) and torch.equal(ours.scale, theirs.scale)
    assert bool(torch.isfinite(logits(loaded, data)).all())
    for _, without in (layers(shifts=False), layers("w4a8")):
        assert all(layer["input"]["grid"] != "shifted" for layer in without.values())


def test_presets_are_settings_of_the_method_and_other_flags_win():
    config = quantize_config(preset="fast", images="x")
    assert config.method == "car-sam-plus" and create(config.method, config.settings).learn is False
    assert quantize_config(preset="fast", images="x", settings=["learn=true"]).settings["learn"] is True
    for name in PRESETS:
        create("car-sam-plus", PRESETS[name])
    with pytest.raises(ConfigError, match="fast, balanced, best"):
        quantize_config(preset="quick", images="x")
    with pytest.raises(ConfigError, match="leave out --method rtn"):
        quantize_config(preset="fast", method="rtn", images="x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"foldings": ["centre"]}, "unknown folding 'centre'; choose from centre values"),
        ({"softmax": []}, "at least one grid"),
        ({"softmax": ["log3"]}, "unknown softmax 'log3'"),
        ({"smoothing": [1.5]}, "0 to 1"),
        ({"observers": ["median"]}, "unknown observer 'median'"),
        ({"images": 0}, "at least one image"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        create("car-sam-plus", {"equivalences": settings})
