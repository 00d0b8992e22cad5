"""A model's own normalisation: read, refused, kept, and the same pixels through transformers."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import SamModel
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

import carsam
from carsam.data.images.normalisation import (
    IMAGENET,
    STRETCHED,
    UNIT,
    Normalisation,
    from_buffers,
    from_preprocessor,
    named_normalisation,
    normalisation_of,
    read_normalisation,
    set_normalisation,
    to_preprocessor,
)
from carsam.data.images.reading import read_image
from carsam.data.images.transforms import Preprocessor, preprocessor_config
from carsam.errors import CheckpointError, ConfigError
from carsam.models.load import load_model
from carsam.models.sam.meta import state_dict_to_meta

OWN = Normalisation((0.5, 0.25, 0.75), (0.5, 0.3, 0.2), 1 / 255)
ON_255 = Normalisation((100.0, 110.5, 120.25), (50.0, 60.1, 70.7))
CONFIGS = {
    "own": ({"image_mean": [0.5, 0.25, 0.75], "image_std": [0.5, 0.3, 0.2]}, OWN),
    "unit": ({"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "rescale_factor": 0.00392156862745098}, UNIT),
    "one number": ({"image_mean": 0.0, "image_std": 1.0}, UNIT),
    "ImageNet": ({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}, IMAGENET),
    "packed before": ({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "size": {}}, IMAGENET),
    "no mean": ({"do_normalize": False}, UNIT),
    "nothing": ({"do_normalize": False, "do_rescale": False}, Normalisation((0.0,) * 3, (1.0,) * 3)),
    "on 255": ({"do_rescale": False, "image_mean": [100, 110.5, 120.25], "image_std": [50, 60.1, 70.7]}, ON_255),
    "defaults": ({"do_normalize": True}, IMAGENET),
    "silent": ({"size": {"longest_edge": 256}}, None),
}


@pytest.fixture
def folder(nano_folder, tmp_path):
    return Path(shutil.copytree(nano_folder, tmp_path / "model"))


def write(folder, **settings):
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(("config", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_reading(config, expected):
    assert from_preprocessor(config, "X") == expected


@pytest.mark.parametrize("normalisation", [IMAGENET, UNIT, OWN, ON_255], ids=["ImageNet", "unit", "own", "on 255"])
@pytest.mark.parametrize("size", [(171, 256), (97, 310), (400, 123)])
def test_transformers_gives_bitwise_the_same_pixels(fresh_nano, tmp_path, normalisation, size):
    set_normalisation(fresh_nano, normalisation)
    write(tmp_path, **preprocessor_config(fresh_nano))
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = SamImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"]
    ours, _ = Preprocessor.for_model(fresh_nano)(image)
    assert torch.equal(theirs, ours)
    assert read_normalisation(tmp_path / "preprocessor_config.json", 256) == normalisation


def test_imagenet_is_segment_anythings_arithmetic():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    assert torch.equal(IMAGENET(pixels), (pixels.float() - mean) / std)
    assert torch.equal(UNIT(pixels), pixels.float() / 255)
    assert UNIT.pixel_std == pytest.approx((255.0,) * 3)


def test_min_max_stretches_each_image():
    pixels = torch.tensor([[10.0, 20.0], [30.0, 60.0]]).expand(3, 2, 2)[None]
    assert STRETCHED(pixels)[0, 0].tolist() == pytest.approx(np.array([[0, 0.2], [0.4, 1]]))
    assert not STRETCHED(torch.full((1, 3, 4, 4), 7)).any()
    settings = to_preprocessor(STRETCHED)
    assert settings["do_normalize"] is False and settings["do_rescale"] is True
    assert from_preprocessor(json.loads(json.dumps(settings)), "X") == STRETCHED


BAD = {
    "zero": ({"image_std": [1, 0, 1]}, r"image_std is \[1, 0, 1\]; it must be three positive numbers"),
    "negative": ({"image_std": [1, -1, 1]}, "image_std"),
    "NaN": ({"image_mean": [0, float("nan"), 0]}, "image_mean is .*nan"),
    "infinite": ({"image_mean": [0, float("inf"), 0]}, "image_mean"),
    "huge": ({"image_mean": [10**400, 0, 0]}, "image_mean"),
    "tiny": ({"image_std": [1e-60] * 3}, "image_std"),
    "two": ({"image_mean": [0, 0]}, "image_mean"),
    "text": ({"image_mean": "imagenet"}, "image_mean is 'imagenet'"),
    "texts": ({"image_std": ["1", "1", "1"]}, "image_std"),
    "null": ({"image_std": None}, "image_std is None"),
    "factor": ({"rescale_factor": 0}, "rescale_factor is 0"),
    "factor text": ({"rescale_factor": "1/255"}, "rescale_factor"),
    "flag": ({"do_normalize": "no"}, "do_normalize is 'no'; it must be true or false"),
    "size": ({"size": {"longest_edge": 1024}}, r"size\.longest_edge 1024, but the model takes images of 256"),
    "pad": ({"pad_size": {"height": 512, "width": 256}}, r"pad_size\.height 512"),
    "no resize": ({"do_resize": False}, "do_resize"),
    "own key": ({"carsam_normalisation": {"kind": "magic"}}, "carsam_normalisation"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_bad_values_name_the_file_and_the_value(folder, settings, message):
    write(folder, **{"do_normalize": True, **settings})
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json.*" + message):
        load_model(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file(folder, content):
    (folder / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json "):
        load_model(folder)


def test_a_folder_decides_and_copies_keep_it(folder):
    write(folder, image_mean=[0, 0, 0], image_std=[1, 1, 1], rescale_factor=1 / 255, size={"longest_edge": 256})
    model = load_model(folder)
    assert normalisation_of(model) == UNIT
    assert normalisation_of(copy.deepcopy(model)) == UNIT
    assert Preprocessor.for_model(copy.deepcopy(model)).normalisation == UNIT
    assert normalisation_of(SamModel.from_pretrained(folder)) == UNIT  # transformers' own way
    assert normalisation_of(load_model(folder, normalise="imagenet")) == IMAGENET
    assert normalisation_of(load_model(folder, normalise="min-max")) == STRETCHED
    model.save_pretrained(folder.parent / "saved")
    assert normalisation_of(load_model(folder.parent / "saved")) == UNIT


@pytest.mark.parametrize("shape", [(3, 1, 1), (3,), (1, 3, 1, 1)])
def test_buffers_of_a_checkpoint_decide(nano, tmp_path, shape):
    state = state_dict_to_meta(nano)
    state |= {"pixel_mean": torch.zeros(shape), "pixel_std": torch.full(shape, 255.0)}
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "medsam.pth")
    model = load_model(tmp_path / "medsam.pth")
    assert normalisation_of(model) == UNIT
    config = preprocessor_config(model)
    assert (config["image_mean"], config["image_std"]) == ([0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_imagenets_buffers_in_any_precision_are_imagenets(dtype):
    mean, std = torch.tensor(IMAGENET.mean, dtype=dtype), torch.tensor(IMAGENET.std, dtype=dtype)
    assert from_buffers(mean, std, "X") == IMAGENET


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (torch.zeros(3), None),
        (None, torch.ones(3)),
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(1), torch.ones(3)),
        (torch.zeros(3), torch.ones(3, 224, 224)),
        (torch.full((3,), torch.nan), torch.ones(3)),
        (torch.zeros(0), torch.ones(3)),
    ],
)
def test_bad_buffers(mean, std):
    with pytest.raises(CheckpointError, match=r"X.* pixel_(mean|std)"):
        from_buffers(mean, std, "X")


def test_an_unknown_name():
    with pytest.raises(ConfigError, match="choose one of imagenet, unit, min-max"):
        named_normalisation("zscore")


@pytest.mark.parametrize("normalisation", [UNIT, OWN, STRETCHED], ids=["unit", "own", "min-max"])
def test_quantizing_keeps_it(nano, quick_config, tmp_path, evaluation_folder, normalisation):
    model = copy.deepcopy(nano)
    set_normalisation(model, normalisation)
    config = dataclasses.replace(quick_config, method="rtn", settings={})
    result = carsam.quantize(model, config.calibration.images, config, out=tmp_path / "packed")
    written = json.loads((tmp_path / "packed" / "preprocessor_config.json").read_text())
    assert from_preprocessor(written, "X") == normalisation
    assert normalisation_of(result.model) == normalisation
    packed = carsam.load(tmp_path / "packed")
    assert normalisation_of(packed) == normalisation
    image = read_image(sorted((evaluation_folder / "images").iterdir())[0])
    pixels, _ = Preprocessor.for_model(packed)(image)
    assert torch.equal(pixels, Preprocessor(256, normalisation)(image)[0])
