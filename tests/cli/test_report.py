"""``carsam report``."""

import json
import shutil
import subprocess
import sys

import pytest

import carsam


@pytest.fixture
def folder(made, tmp_path):
    """A packed folder to write into."""
    return shutil.copytree(made[0], tmp_path / "packed")


def test_report_of_a_packed_folder(folder, carsam_cli, tmp_path):
    result = carsam_cli("report", folder)
    assert result.exit_code == 0, result.output
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    assert "car-sam" in html and "W4A4" in html
    # The units of the quantization are there, the diagnosis is not.
    assert 'id="loss-14-title"' in html
    assert "carsam diagnose FLOAT packed --images IMAGES --coco INSTANCES.json" in html
    assert f"{folder / 'report.html'}  0." in result.stdout
    assert "not known: Accuracy, Example images, Attention" in result.stderr
    carsam.load(folder)  # the report is not part of the checksums

    elsewhere = tmp_path / "new" / "page.html"
    assert carsam_cli("report", folder, "--out", elsewhere).exit_code == 0
    assert elsewhere.read_text(encoding="utf-8") == html


def test_scores_of_both_models(folder, carsam_cli, tmp_path):
    scores = {"mean_iou": 40.25, "segm_ap": 20.0, "box_ap": 30.0, "n_images": 2, "n_prompts": 7}
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "evaluation": scores}))
    floating = tmp_path / "float.json"
    floating.write_text(json.dumps({**scores, "mean_iou": 50.5}))
    result = carsam_cli("report", folder, "--float-scores", floating)
    assert result.exit_code == 0, result.output
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "−10.25" in html and "50.50" in html


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder), ["is not a folder", "carsam quantize"]),
        (lambda folder: (folder / "config.json").unlink(), ["has no config.json"]),
        (lambda folder: (folder / "config.json").write_text("{}"), ["is not a packed carsam model"]),
        (lambda folder: (folder / "results.json").write_text("{"), ["results.json is damaged"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), ["truncated or altered"]),
        (lambda folder: (folder / "report.html").mkdir(), ["cannot write", "directory"]),
    ],
)
def test_mistakes(damage, words, folder, carsam_cli):
    damage(folder)
    before = sorted(folder.iterdir()) if folder.exists() else []
    result = carsam_cli("report", folder)
    assert result.exit_code == 1
    message = result.stderr[result.stderr.index("error: ") :]
    assert len(message.strip().splitlines()) == 1
    for word in words:
        assert word in message
    assert before == (sorted(folder.iterdir()) if folder.exists() else [])


def test_a_float_model_is_no_packed_folder(carsam_cli, nano_folder):
    result = carsam_cli("report", nano_folder)
    assert result.exit_code == 1
    assert "not a packed carsam model" in result.stderr
    assert not (nano_folder / "report.html").exists()


def test_no_model_is_loaded(folder):
    """A report takes a moment: neither torch nor transformers is imported for it."""
    code = (
        "import sys; sys.argv = ['carsam', 'report', sys.argv[1]]\n"
        "from carsam.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
