"""``--image-size``: a MobileSAM of another resolution, and sizes that do not fit."""

import pytest
import torch
from tinyvit_state import published_state

from carsam.commands.common import open_model
from carsam.errors import CarsamError
from carsam.models.family import family_of
from carsam.models.load import load_model


@pytest.fixture(scope="module")
def mobilesam(tmp_path_factory):
    """A small MobileSAM in its published form."""
    path = tmp_path_factory.mktemp("mobilesam") / "mobile_sam.pt"
    torch.save(published_state(), path)
    return path


def test_a_checkpoint_takes_another_size(mobilesam):
    assert family_of(load_model(mobilesam)).image_size(load_model(mobilesam)) == 1024
    model = load_model(mobilesam, image_size=128)
    assert family_of(model).image_size(model) == 128
    assert model.get_image_embeddings(torch.zeros(1, 3, 128, 128)).shape == (1, 256, 8, 8)


@pytest.mark.parametrize("size", [1000, 8, 0])
def test_a_size_of_no_whole_cells_is_refused(mobilesam, size):
    with pytest.raises(CarsamError, match="multiple of 16"):
        load_model(mobilesam, image_size=size)


def test_a_model_that_knows_its_size_refuses_another(nano_folder, packed_folder):
    for folder in (nano_folder, packed_folder):
        assert open_model(str(folder), "cpu", image_size=256) is not None
        with pytest.raises(CarsamError, match="takes images of 256 pixels, not 512"):
            open_model(str(folder), "cpu", image_size=512)


def test_quantize_keeps_the_size_in_its_recipe(mobilesam, calibration_folder, tmp_path, carsam_cli):
    done = carsam_cli(
        *("quantize", mobilesam, "--data", calibration_folder / "images", "--box-source", "grid", "--n-images", 1),
        *("--method", "rtn", "--image-size", 128, "--set", "weight_observer=min-max", "--out", tmp_path / "m"),
    )
    assert done.exit_code == 0, done.output
    assert "image_size: 128" in (tmp_path / "m" / "recipe.yaml").read_text()
    assert family_of(open_model(str(tmp_path / "m"), "cpu")).image_size(open_model(str(tmp_path / "m"), "cpu")) == 128
