"""Fixtures that many tests share. Models and folders of the session are read-only; ``fresh_nano`` may be changed."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch: it says how threads wait.
import carsam

# Small models gain nothing from a second thread: the suite takes a third less time with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# pytest-xdist tells its workers the size of a terminal; what tests print goes to none.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.pop("COLUMNS", None)
    os.environ.pop("LINES", None)

import pytest
import torch
from PIL import Image
from places import CALIBRATION, EVALUATION, NANO, ROOT
from tinyvit_state import SIDES, SMALL
from transformers import SamModel

from carsam.config import CalibrationConfig, QuantizeConfig
from carsam.data.images.normalisation import PREPROCESSOR
from carsam.data.images.transforms import preprocessor_config
from carsam.models.load import load_model
from carsam.models.tinyvit.random import random_tinyvit
from carsam.prompts.calibration import CalibrationSet, calibration_set

# Two steps a unit and no searched ranges: every stage runs, in two seconds instead of minutes.
QUICK = {
    "reconstruction": {"steps": 2, "decoder_steps": 2},
    "mac": {"solver": "pooled", "value": True},
    "weight_observer": "min-max",
    "activation_observer": "min-max",
}
N_IMAGES, BOXES_PER_IMAGE = 3, 2


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """carsam's cache, away from the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARSAM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def nano_folder() -> Path:
    """The embedded float model: a transformers folder."""
    return NANO


@pytest.fixture(scope="session")
def calibration_folder() -> Path:
    """Calibration images (``images``) with their ``instances.json``."""
    return CALIBRATION


@pytest.fixture(scope="session")
def evaluation_folder() -> Path:
    """Evaluation images (``images``) with their ``instances.json``."""
    return EVALUATION


@pytest.fixture(scope="session")
def nano(nano_folder: Path) -> SamModel:
    """The embedded float model; read-only."""
    return load_model(nano_folder)


@pytest.fixture
def fresh_nano(nano: SamModel) -> SamModel:
    """A copy of the embedded float model to change."""
    return copy.deepcopy(nano)


@pytest.fixture(scope="session")
def small_set(nano: SamModel, calibration_folder: Path) -> CalibrationSet:
    """Three calibration images with two boxes each."""
    return calibration_set(
        nano,
        calibration_folder / "images",
        coco=calibration_folder / "instances.json",
        n_images=N_IMAGES,
        boxes_per_image=BOXES_PER_IMAGE,
    )


@pytest.fixture(scope="session")
def quick_config(calibration_folder: Path) -> QuantizeConfig:
    """CAR-SAM at W4A4 on the images of ``small_set``, in a few seconds."""
    data = CalibrationConfig(
        images=str(calibration_folder / "images"),
        coco=str(calibration_folder / "instances.json"),
        n_images=N_IMAGES,
        boxes_per_image=BOXES_PER_IMAGE,
    )
    return QuantizeConfig("car-sam", settings=QUICK, calibration=data)


@pytest.fixture(scope="session")
def packed_folder(tmp_path_factory: pytest.TempPathFactory, nano_folder: Path, quick_config: QuantizeConfig) -> Path:
    """A packed model made with ``quick_config``; read-only."""
    folder = tmp_path_factory.mktemp("packed") / "nano-w4a4"
    carsam.quantize(nano_folder, quick_config.calibration.images, quick_config, out=folder)
    return folder


@pytest.fixture(scope="session")
def pixel_values(small_set: CalibrationSet) -> torch.Tensor:
    """One preprocessed image, ``(1, 3, 256, 256)``."""
    return small_set.images[0].pixel_values


@pytest.fixture(scope="session")
def input_boxes(small_set: CalibrationSet) -> torch.Tensor:
    """Its box prompts as transformers takes them, ``(1, P, 4)``."""
    return small_set.images[0].boxes[None]


@pytest.fixture
def photos(evaluation_folder: Path, tmp_path: Path) -> Path:
    """A folder with ``a.png``, ``a.jpg`` (another picture) and ``b.jpg``, 96 × 64 pixels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    with Image.open(evaluation_folder / "images" / "000000000885.jpg") as image:
        small = image.resize((96, 64))
    small.save(folder / "a.png")
    small.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "a.jpg")
    small.save(folder / "b.jpg")
    return folder


@pytest.fixture(scope="session")
def tinyvit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MobileSAM with random weights, as transformers saves it; read-only."""
    folder = tmp_path_factory.mktemp("tinyvit") / "mobilesam-small"
    model = random_tinyvit("mobilesam", SIDES["mobilesam"], **SMALL)
    model.save_pretrained(folder)
    (folder / PREPROCESSOR).write_text(json.dumps(preprocessor_config(model)))
    return folder


@pytest.fixture(scope="session")
def tinyvit_packed_folder(
    tmp_path_factory: pytest.TempPathFactory, tinyvit_folder: Path, calibration_folder: Path
) -> Path:
    """The same rounded to nearest at W4A4; read-only."""
    folder = tmp_path_factory.mktemp("tinyvit-packed") / "mobilesam-small-w4a4"
    data = CalibrationConfig(
        images=str(calibration_folder / "images"),
        coco=str(calibration_folder / "instances.json"),
        n_images=2,
        boxes_per_image=BOXES_PER_IMAGE,
    )
    config = QuantizeConfig("rtn", bits="w4a4", calibration=data)
    carsam.quantize(tinyvit_folder, data.images, config, out=folder, write_results=True)
    return folder
