"""Flags and recipes become a configuration."""

import pytest
import yaml

from carsam.commands.recipe import parse_assignments, parse_overrides, quantize_config
from carsam.errors import ConfigError


def test_defaults():
    config = quantize_config(images="photos", coco=None, seed=None)
    assert (config.method, config.bits, config.settings, config.overrides) == ("car-sam-plus", "w4a4", {}, {})
    # Both flags leave something out of CAR-SAM, so without a method they mean that one.
    assert {quantize_config(**{flag: True}).method for flag in ("no_mac", "no_jcar")} == {"car-sam"}
    assert quantize_config(no_mac=True, method="car-sam-plus").method == "car-sam-plus"
    assert (config.calibration.images, config.calibration.n_images) == ("photos", 32)


def test_assignments_are_nested_yaml():
    assignments = ["a.b=1", "a.c=[1, 2]", "d=yes", "e=1e-3", "f=text", "g=null", "h=x=y"]
    expected = {"a": {"b": 1, "c": [1, 2]}, "d": True, "e": 1e-3, "f": "text", "g": None, "h": "x=y"}
    assert parse_assignments(assignments) == expected


def test_overrides_split_at_the_last_equals_sign():
    assert parse_overrides(["*.mlp.[a=b]=w8a8"]) == {"*.mlp.[a=b]": "w8a8"}


def test_flags_for_single_settings():
    settings = quantize_config(steps=7, no_mac=True, no_jcar=True, settings=["reconstruction.steps=9"]).settings
    assert settings == {
        "reconstruction": {"steps": 9, "decoder_steps": 7},  # --set is the more exact of the two
        "mac": {"query": False, "key": False, "value": False},
        "granularity": "module",
    }


def test_flags_override_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    values = {
        "carsam_version": "0.0.1",
        "model": "somewhere",
        "calibration_fingerprint": "0",
        "method": "car-sam",
        "settings": {"mac": {"solver": "pooled"}, "granularity": "block"},
        "bits": "w6a6",
        "overrides": {"*.probs": "w6a8", "*.neck.*": "w8a8"},
        "calibration": {"images": "photos", "coco": "photos.json", "n_images": 5},
    }
    recipe.write_text(yaml.safe_dump(values, sort_keys=False))
    config = quantize_config(recipe=recipe)
    assert config.settings == values["settings"]
    assert config.overrides == values["overrides"]
    assert (config.bits, config.calibration.n_images, config.calibration.coco) == ("w6a6", 5, "photos.json")

    config = quantize_config(
        recipe=recipe, bits="w4a4", n_images=9, granularity="pair", overrides=["*.probs=w4a4"], settings=["mac.key=no"]
    )
    assert config.settings == {"mac": {"solver": "pooled", "key": False}, "granularity": "pair"}
    assert list(config.overrides.items()) == [("*.neck.*", "w8a8"), ("*.probs", "w4a4")]
    assert (config.bits, config.calibration.n_images, config.calibration.images) == ("w4a4", 9, "photos")


def test_another_method_leaves_the_recipes_settings(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: car-sam\nsettings: {granularity: block}\nbits: w6a6\n")
    config = quantize_config(recipe=recipe, method="rtn")
    assert (config.method, config.settings, config.bits) == ("rtn", {}, "w6a6")


def test_a_wrong_setting_is_told_with_the_recipe(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("settings: {granularity: pear}\n")
    with pytest.raises(ConfigError, match=r"with the recipe .*mine\.yaml: unknown granularity 'pear'"):
        quantize_config(recipe=recipe)
    recipe.write_text("method: [rtn]\n")
    with pytest.raises(ConfigError, match=r"unknown method \['rtn'\]"):
        quantize_config(recipe=recipe)
    recipe.write_text("bits: w4\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: cannot read the bits 'w4'"):
        quantize_config(recipe=recipe)


def test_a_recipe_keeps_the_normalisation(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: rtn\nnormalise: unit\n")
    assert quantize_config(recipe=recipe).normalise == "unit"
    assert quantize_config(recipe=recipe, normalise="min-max").to_dict()["normalise"] == "min-max"
    recipe.write_text("normalise: median\n")
    with pytest.raises(ConfigError, match="median"):
        quantize_config(recipe=recipe)


def test_steps_are_those_of_a_unit_and_of_the_finished_model_where_a_preset_tunes_it():
    assert quantize_config(steps=7, preset="best").settings["tuning"] == {"steps": 7}
    assert quantize_config(steps=7, preset="best", settings=["tuning.steps=9"]).settings["tuning"] == {"steps": 9}
    for preset in (None, "fast", "balanced"):
        assert "tuning" not in quantize_config(steps=7, preset=preset).settings
