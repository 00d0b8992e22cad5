"""``--runtime`` of predict and evaluate, and ``carsam benchmark`` where it refuses."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime", reason="an optional package: carsam[onnx]")


def test_evaluate_on_onnx_runtime(carsam_cli, packed_folder, evaluation_folder, tmp_path):
    data = ["--coco", evaluation_folder / "instances.json", "--images", evaluation_folder / "images", "--limit", 2]
    found = {}
    for runtime in ("torch", "onnx"):
        path = tmp_path / f"{runtime}.json"
        run = carsam_cli("evaluate", packed_folder, *data, "--no-save", "--runtime", runtime, "--json", path)
        assert run.exit_code == 0, run.stderr
        found[runtime] = json.loads(path.read_text())
    assert found["onnx"].pop("runtime") == "onnx" and "runtime" not in found["torch"]
    # The integers are the same; sums in floating point around them are not, and move a few pixels.
    assert abs(found["onnx"]["mean_iou"] - found["torch"]["mean_iou"]) < 1


def test_predict_on_onnx_runtime(carsam_cli, packed_folder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for runtime in ("torch", "onnx"):
        out = ["--out", tmp_path / runtime, "--format", "npz"]
        run = carsam_cli("predict", packed_folder, tmp_path / "a.png", "--box", "5,5,60,50", "--runtime", runtime, *out)
        assert run.exit_code == 0, run.stderr
    masks = [np.load(next((tmp_path / runtime).glob("*.npz")))["masks"] for runtime in ("torch", "onnx")]
    assert (masks[0] == masks[1]).mean() > 0.98


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "none", "--video", "frames", "--box", "1,2,3,4", "--runtime", "onnx"], "--video runs in torch"),
        (
            ["evaluate", "none", "--video", "root", "--runtime", "onnx"],
            "--video runs in torch; leave out --runtime onnx",
        ),
        (["benchmark", "none", "--coco", "a.json"], "--coco and --images must be given together"),
        (["benchmark", "none"], "no such file or folder: none"),
        (["benchmark", "none", "nowhere"], "nowhere is not a packed folder; give what carsam quantize wrote."),
    ],
)
def test_refusals(carsam_cli, arguments, message):
    run = carsam_cli(*arguments)
    assert run.exit_code == 1 and message in run.stderr


def test_an_unknown_runtime_is_refused_before_the_model_is_read(carsam_cli, packed_folder, tmp_path):
    run = carsam_cli("evaluate", packed_folder, "--coco", "a", "--images", "b", "--runtime", "tpu")
    assert run.exit_code == 1 and "unknown runtime 'tpu'; choose from torch, onnx, cuda." in run.stderr


def test_only_rows_that_are_there(carsam_cli, nano_folder):
    run = carsam_cli("benchmark", nano_folder, "--only", "nothing like it", "--rounds", 1)
    assert run.exit_code == 1 and "no row's name holds nothing like it" in run.stderr
