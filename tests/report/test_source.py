"""Reading a folder: what is not a packed folder, or damaged, is told in plain words."""

import json
import shutil

import pytest
from packed_example import save_diagnosis

from carsam.errors import CarsamError
from carsam.report.source import read_source


@pytest.fixture
def folder(bare_folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(bare_folder, tmp_path / "packed")


def test_what_is_there(full_folder):
    source = read_source(full_folder)
    assert source.quantization_config["method"] == "car-sam"
    assert source.evaluation["mean_iou"] == 61.2 and source.float_evaluation["mean_iou"] == 70.9
    assert source.weights_bytes == (full_folder / "model.safetensors").stat().st_size
    assert source.tensors["vision_encoder.neck.conv1.weight"].bytes == 2048
    assert source.recipe["method"] == "car-sam"


def test_what_is_not(bare_folder):
    source = read_source(bare_folder)
    assert source.diagnosis is None
    assert not source.evaluation and not source.float_evaluation and not source.quantization


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, ["has no config.json", "carsam quantize"]),
        ("config.json", "{}", ["not a packed carsam model"]),
        ("config.json", '{"quantization_config": {"quant_method": "gptq"}}', ["not a packed carsam model"]),
        ("config.json", '{"quantization_config": {"quant_method": "carsam"}}', ["names no quantized layer"]),
        ("config.json", "{", ["config.json is damaged", "valid JSON"]),
        ("results.json", "[]", ["results.json is damaged", "list"]),
        ("results.json", '{"evaluation": ', ["results.json is damaged"]),
        ("results.json", "[" * 100_000, ["results.json is damaged"]),
        ("recipe.yaml", "a: [1", ["recipe.yaml is damaged"]),
        ("recipe.yaml", b"\xff\xfe\x00", ["not text"]),
        ("model.safetensors", "short", ["truncated or altered"]),
        ("model.safetensors", b"\xff" * 64, ["truncated or altered"]),
        ("model.safetensors", b"\x02" + b"\0" * 7 + b"[]", ["truncated or altered"]),
        ("diagnosis/diagnosis.json", "oops", ["diagnosis.json is damaged", "carsam diagnose again"]),
        ("diagnosis/diagnosis.json", '{"format": 9}', ["format 9", "reads 1"]),
    ],
)
def test_damage(name, content, words, folder):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CarsamError) as caught:
        read_source(folder)
    for word in words:
        assert word in str(caught.value)


def test_not_a_folder(tmp_path):
    with pytest.raises(CarsamError, match="not a folder"):
        read_source(tmp_path / "nowhere")


def test_float_scores_of_their_own(folder, tmp_path):
    scores = tmp_path / "float.json"
    scores.write_text(json.dumps({"mean_iou": 50.0}))
    assert read_source(folder, scores).float_evaluation == {"mean_iou": 50.0}
    with pytest.raises(CarsamError, match="cannot read"):
        read_source(folder, tmp_path / "missing.json")


def test_nan_in_a_diagnosis(folder):
    save_diagnosis(folder, {"format": 1, "n_images": float("nan")})
    assert read_source(folder).diagnosis["format"] == 1
