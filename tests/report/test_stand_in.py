"""A report of the embedded model says that it is a stand-in; any other's does not."""

import json
import shutil

import pytest
from test_page import words

from carsam.report.page import render
from carsam.report.source import read_source

NOTICE = "This is not Meta’s SAM but a small model"


def test_the_embedded_model_is_one(packed_folder):
    """Told by its encoder: also where the recipe does not name it."""
    text = words(render(read_source(packed_folder)).html)
    assert text.index(NOTICE) < text.index("Contents")
    assert "they say nothing about SAM-B" in text


@pytest.mark.parametrize(
    "model", ["embedded/sam-nano-256", "sam-nano-256", "somewhere/sam-nano-256-stressed", "embedded/sam2-nano-256"]
)
def test_told_by_its_name(model, bare_folder, tmp_path):
    folder = shutil.copytree(bare_folder, tmp_path / "packed")
    (folder / "recipe.yaml").write_text(f"model: {model}\n")
    assert read_source(folder).is_stand_in


@pytest.mark.parametrize("encoder", [{"hidden_size": 768, "image_size": 1024}, {}, None, [], {"hidden_size": 192}])
def test_others_are_none(encoder, bare_folder, tmp_path):
    folder = shutil.copytree(bare_folder, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision_config": encoder}))
    assert not read_source(folder).is_stand_in
    assert NOTICE not in words(render(read_source(folder)).html)
