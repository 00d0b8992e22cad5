"""quantize → evaluate → predict → info, through the command line."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

import carsam
from carsam.commands.common import duration, float16_bytes, megabytes, read_results


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "results.json"}


def test_quantize_writes_what_the_api_writes(made, packed_folder):
    folder, result = made
    assert files(folder) == files(packed_folder)
    assert set(files(folder)) == {
        *("config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml", "SHA256SUMS", "README.md"),
    }
    assert not list(folder.parent.glob("*.partial"))
    units = read_results(folder)["quantization"]["units"]
    assert [unit["steps"] for unit in units] == [2] * 14
    # Progress as plain lines, for want of a terminal, and the summary.
    assert "unit 14/14" in result.stderr
    assert "times smaller than FP16's 17.0 MB" in result.stdout


def test_evaluate_packed_notes_its_scores(made, carsam_cli, evaluation_folder, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "packed")
    data = ["--coco", evaluation_folder / "instances.json", "--images", evaluation_folder / "images", "--limit", 2]
    report = tmp_path / "scores.json"
    result = carsam_cli("evaluate", folder, *data, "--json", report, "--points", "--no-save")
    assert result.exit_code == 0, result.output
    scores = json.loads(report.read_text())
    assert {"segm_ap", "box_ap", "mean_iou", "points"} <= set(scores)
    assert f"{scores['mean_iou']:.2f}" in result.stdout
    assert "evaluation" not in read_results(folder)

    assert carsam_cli("evaluate", folder, *data).exit_code == 0
    saved = read_results(folder)
    assert saved["evaluation"]["mean_iou"] == scores["mean_iou"]
    assert "quantization" in saved
    carsam.load(folder)  # the measurements are not part of the checksums


def test_json_alone_on_stdout(carsam_cli, made, nano_folder, calibration_folder, evaluation_folder, tmp_path):
    """``--json -`` of the commands that measure: the standard output is JSON, everything else is on the other one."""
    images, coco = calibration_folder / "images", calibration_folder / "instances.json"
    calibration = ["--data", images, "--data-coco", coco]
    measured = ["--images", evaluation_folder / "images", "--coco", evaluation_folder / "instances.json"]
    recipe = tmp_path / "compare.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "calibration": {"n_images": 1, "boxes_per_image": 1},
                "rows": [{"name": "nearest", "method": "rtn", "settings": {"activation_observer": "min-max"}}],
            }
        )
    )
    quick = ["--n-images", 1, "--method", "rtn", "--set", "activation_observer=min-max", "--device", "cpu"]
    commands = {
        "stages": ["quantize", nano_folder, *calibration, *quick, "--out", tmp_path / "q"],
        "measurements": [
            *("compare", "--recipe", recipe, "--model", nano_folder, *calibration, *measured),
            *("--out", tmp_path / "c", "--device", "cpu"),
        ],
        "attentions": [
            *("diagnose", nano_folder, made[0], *measured, "--limit", 1, "--boxes-per-image", 1),
            *("--no-sensitivity", "--out", tmp_path / "d", "--device", "cpu"),
        ],
        "regions": ["info", made[0]],
    }
    for key, command in commands.items():
        result = carsam_cli(*command, "--json", "-")
        assert result.exit_code == 0, result.output
        values = json.loads(result.stdout)
        assert key in values, (command[0], list(values))
        assert result.stderr


def test_evaluate_float(carsam_cli, nano_folder, evaluation_folder):
    before = sorted(path.name for path in nano_folder.iterdir())
    result = carsam_cli(
        *("evaluate", nano_folder, "--limit", 1),
        *("--coco", evaluation_folder / "instances.json", "--images", evaluation_folder / "images"),
    )
    assert result.exit_code == 0, result.output
    assert "mean IoU" in result.stdout
    assert sorted(path.name for path in nano_folder.iterdir()) == before


@pytest.mark.parametrize("kind", ["packed", "float"])
def test_predict(kind, made, nano_folder, carsam_cli, evaluation_folder, tmp_path):
    image = sorted((evaluation_folder / "images").iterdir())[0]
    model = made[0] if kind == "packed" else nano_folder
    boxes = ["--box", "10,20,200,220", "--box", "50.5,60,5000,300"]
    result = carsam_cli("predict", model, image, *boxes, "--out", tmp_path / "masks")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("predicted IoU") == 2
    with Image.open(image) as original:
        size = original.size
    for index in (1, 2):
        mask = Image.open(tmp_path / "masks" / f"{image.stem}_mask_{index}.png")
        assert mask.size == size
        assert set(np.unique(mask)) <= {0, 255}
    assert Image.open(tmp_path / "masks" / f"{image.stem}_overlay.png").size == size


def test_predict_points_are_one_object(made, carsam_cli, evaluation_folder, tmp_path):
    image = sorted((evaluation_folder / "images").iterdir())[0]
    points = ["--point", "100,100", "--point", "20,30,0"]
    for i, flags in enumerate((points, points[:2], [*points, "--box", "10,20,200,220"])):
        result = carsam_cli("predict", made[0], image, *flags, "--out", tmp_path / str(i))
        assert result.exit_code == 0, result.output
        assert result.stdout.count("predicted IoU") == 1


def test_info(made, nano_folder, carsam_cli):
    packed = carsam_cli("info", made[0])
    assert "car-sam at w4a4" in packed.stdout
    assert "solver: pooled" in packed.stdout
    assert "grids of activations: uniform × 126" in packed.stdout
    floating = carsam_cli("info", nano_folder)
    assert "floating point, 17.0 MB" in floating.stdout
    for result in (packed, floating):
        assert result.exit_code == 0
        assert "decoder transformer" in result.stdout


def test_float16_bytes_is_the_float_file(nano, nano_folder, packed_folder):
    file = (nano_folder / "model.safetensors").stat().st_size
    assert float16_bytes(nano) == float16_bytes(carsam.load(packed_folder)) == pytest.approx(file, rel=0.01)


def test_methods(carsam_cli):
    listing = carsam_cli("methods").stdout
    assert "P in log2 codes" in listing
    assert all(name in listing for name in ("rtn", "brecq", "qdrop", "car-sam"))
    assert "mac.solver" in carsam_cli("methods", "car-sam").stdout


def test_recipe_round_trip(quantize_flags, carsam_cli, nano_folder, tmp_path, monkeypatch):
    """In a cache of its own: another test may have quantized on copies of the same images, which recipes find then."""
    monkeypatch.setenv("CARSAM_CACHE", str(tmp_path / "cache"))
    first, again = tmp_path / "first", tmp_path / "again"
    result = carsam_cli(*quantize_flags, "--out", first)
    assert result.exit_code == 0, result.output
    result = carsam_cli("quantize", nano_folder, "--recipe", first / "recipe.yaml", "--out", again)
    assert result.exit_code == 0, result.output
    assert files(again) == files(first)


def test_bits_for_and_boxes_of_the_model(carsam_cli, nano_folder, calibration_folder, tmp_path):
    """Nearest rounding, boxes without a COCO file, and layers with bits of their own."""
    result = carsam_cli(
        *("quantize", nano_folder, "--data", calibration_folder / "images", "--n-images", 1, "--method", "rtn"),
        *("--bits", "w6a8", "--bits-for", "*.neck.*=w8a8", "--bits-for", "*.probs=w6a4", "--out", tmp_path / "q"),
        *("--set", "weight_observer=min-max", "--set", "activation_observer=min-max"),
    )
    assert result.exit_code == 0, result.output
    recipe = yaml.safe_load((tmp_path / "q" / "recipe.yaml").read_text())
    assert recipe["overrides"] == {"*.neck.*": "w8a8", "*.probs": "w6a4"}
    model = carsam.load(tmp_path / "q")
    assert model.vision_encoder.neck.conv1.weight_bits == 8
    assert model.vision_encoder.layers[0].attn.qkv.weight_bits == 6
    assert model.vision_encoder.layers[0].attn.matmul.probs.bits == 4


def test_help_is_quick():
    """The console script answers --help and --version without importing torch."""
    code = (
        "import sys; sys.argv = ['carsam', {flag!r}]\n"
        "from carsam.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {{'torch', 'transformers', 'numpy'}} & set(sys.modules)\n"
    )
    for flag, text in (("--help", "quantize"), ("--version", carsam.__version__)):
        command = [sys.executable, "-c", code.format(flag=flag)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert text in done.stdout


def test_units_of_sizes_and_times():
    assert [megabytes(3_140_000), megabytes(1_250_000_000)] == ["3.1 MB", "1.25 GB"]
    assert [duration(41.26), duration(192), duration(7500)] == ["41.3 s", "3 min 12 s", "2 h 5 min"]
