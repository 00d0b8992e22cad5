"""``carsam diagnose`` from the command line."""

import json
import shutil

import pytest


@pytest.fixture(scope="module")
def folder(packed_folder, tmp_path_factory):
    """A packed folder to write into."""
    return shutil.copytree(packed_folder, tmp_path_factory.mktemp("diagnose") / "nano-w4a4")


def test_diagnose(carsam_cli, nano_folder, folder, evaluation_folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = carsam_cli(
        *("diagnose", nano_folder, folder, "--images", evaluation_folder / "images"),
        *("--coco", evaluation_folder / "instances.json", "--limit", 1, "--boxes-per-image", 1, "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    values = json.loads((folder / "diagnosis" / "diagnosis.json").read_text())
    assert (values["n_images"], values["n_prompts"]) == (1, 1)
    assert (values["float"], values["quantized"]) == (str(nano_folder), str(folder))
    assert len(values["sensitivity"]) == 66 + 126
    assert {each["kind"] for each in values["sensitivity"]} == {"weight", "activation"}
    assert all(each["error"] >= 0 and 0 <= each["iou"] <= 1 for each in values["sensitivity"])
    # Each site alone costs less than all together.
    assert max(each["error"] for each in values["sensitivity"]) < 1

    for text in ("mean IoU", "attentions that changed most", "most sensitive sites", "1 boxes on 1 images"):
        assert text in result.stdout
    assert str(folder / "diagnosis") in result.stdout
    worst = max(values["attentions"], key=lambda each: each["kl"])["name"]
    assert worst.rpartition("layers.")[2] in result.stdout
    assert "site 1/192" in result.stderr
    # Nothing else in the packed folder changed.
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["diagnosis"]


def test_without_sensitivity_to_another_folder(carsam_cli, nano_folder, packed_folder, evaluation_folder, tmp_path):
    out = tmp_path / "here"
    result = carsam_cli(
        *("diagnose", nano_folder, packed_folder, "--images", evaluation_folder / "images", "--limit", 1),
        *("--boxes-per-image", 1, "--no-sensitivity", "--out", out, "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    values = json.loads((out / "diagnosis.json").read_text())
    assert values["sensitivity"] == []
    assert values["reference"] == "float model's masks"
    assert values["mean_iou_float"] == 1
    assert 0 <= values["mean_iou_quantized"] < 1
    assert values["examples"][0]["truth"] is None
    assert "most sensitive" not in result.stdout
    assert not (packed_folder / "diagnosis").exists()


def test_interrupted(carsam_cli, nano_folder, packed_folder, evaluation_folder, monkeypatch, tmp_path):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("carsam.diagnose.run.run_passes", interrupted)
    result = carsam_cli(
        *("diagnose", nano_folder, packed_folder, "--images", evaluation_folder / "images", "--limit", 1),
        *("--coco", evaluation_folder / "instances.json", "--out", tmp_path / "out"),
    )
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantized": "float"}, ["not a packed carsam model", "carsam quantize"]),
        ({"float": "quantized"}, ["already quantized"]),
        ({"float": "missing"}, ["missing"]),
        ({"quantized": "missing"}, ["not a packed carsam model"]),
        ({"--images": "missing"}, ["missing"]),
        ({"--coco": "missing.json"}, ["missing.json"]),
        ({"--out": "float"}, ["is not a diagnosis", "--out"]),
        ({"--device": "abacus"}, ["'abacus'"]),
    ],
)
def test_mistakes(change, words, carsam_cli, nano_folder, packed_folder, evaluation_folder, tmp_path):
    places = {"float": nano_folder, "quantized": packed_folder, "missing": tmp_path / "missing"}
    values = {
        "float": "float",
        "quantized": "quantized",
        "--images": evaluation_folder / "images",
        "--coco": evaluation_folder / "instances.json",
        "--out": tmp_path / "out",
        **change,
    }
    values = {key: places.get(value, value) if isinstance(value, str) else value for key, value in values.items()}
    flags = [part for key, value in values.items() if key.startswith("--") for part in (key, value)]
    result = carsam_cli("diagnose", values["float"], values["quantized"], *flags)
    assert result.exit_code == 1, result.output
    message = result.stderr[result.stderr.index("error: ") :]
    assert len(message.strip().splitlines()) == 1
    for word in words:
        assert word in message
    assert not list(tmp_path.iterdir())
