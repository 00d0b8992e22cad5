"""The quick start: what it shows. How it shows it, see test_showcase.py."""

import pytest

from carsam.commands import quickstart
from carsam.errors import DataError


def test_the_default_is_car_sam_at_w4a4():
    config = quickstart.embedded_sample().config(quickstart.N_IMAGES)
    assert (config.method, config.bits, config.settings) == ("car-sam", "w4a4", {})
    assert config.calibration.n_images == 24


def test_without_the_repository(tmp_path):
    with pytest.raises(DataError, match="repository"):
        quickstart.embedded_sample(tmp_path)
