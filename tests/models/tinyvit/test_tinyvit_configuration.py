"""Configurations survive JSON, and refuse numbers that make no encoder."""

import json

import pytest

from carsam.errors import ConfigError
from carsam.models.skeleton import BAD_CONFIG
from carsam.models.tinyvit.configuration import TinyVitConfig, TinyVitSamConfig
from carsam.models.tinyvit.random import tinyvit_config


@pytest.mark.parametrize("kind", ["mobilesam", "litemedsam"])
def test_a_configuration_survives_json(kind):
    config = tinyvit_config(kind)
    again = TinyVitSamConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()
    assert type(again.vision_config) is TinyVitConfig


def test_litemedsam_has_a_cell_for_every_four_pixels():
    config = tinyvit_config("litemedsam")
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (256, 4)
    assert config.prompt_encoder_config.image_embedding_size == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 100}, "image_size is 100; it must be a positive multiple of 16"),
        ({"image_size": "a"}, "expected int, got str"),
        ({"embed_dims": [64, 128]}, "depths has 4 entries with 2 embed_dims"),
        ({"embed_dims": [64], "depths": [2], "num_heads": [], "window_sizes": [], "merge_strides": []}, "two stages"),
        ({"num_heads": [4, 5, 9]}, "9 heads do not divide a stage's width 320"),
        ({"window_sizes": [7, 0, 7]}, "window_sizes has 0"),
        ({"patch_kernel": 2}, "patch_kernel is 2"),
        ({"merge_strides": [2, 4, 1]}, "each must be 1 or 2"),
        ({"embed_dims": [63, 128, 160, 320]}, "even width"),
        ({"local_conv_size": 4}, "must be odd"),
        ({"mlp_ratio": 0.001}, "at least one channel"),
    ],
)
def test_settings_that_make_no_encoder_are_refused(settings, message):
    with pytest.raises(BAD_CONFIG, match=message):
        TinyVitConfig(**settings)


def test_parts_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match=r"embedding of 16 cells, but the image encoder takes 256 pixels and makes 64"):
        TinyVitSamConfig(
            vision_config={"patch_kernel": 1, "image_size": 256},
            prompt_encoder_config={"image_size": 256, "patch_size": 16},
        )


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="unknown TinyViT SAM 'sam'; choose one of mobilesam, litemedsam"):
        tinyvit_config("sam")
    with pytest.raises(ConfigError, match="image_size is 30"):
        tinyvit_config("litemedsam", 30)
