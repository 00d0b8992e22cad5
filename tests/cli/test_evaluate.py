"""``carsam evaluate``: tables, JSON, the float model beside, interruption, folders that cannot be written."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

import carsam.evaluate.coco_metrics
from carsam.commands.common import read_results
from carsam.errors import CarsamError

LIMIT = 4


@pytest.fixture(scope="module")
def data(evaluation_folder):
    return ["--coco", evaluation_folder / "instances.json", "--images", evaluation_folder / "images", "--limit", LIMIT]


@pytest.fixture(scope="module")
def float_json(carsam_cli, nano_folder, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "float.json"
    assert carsam_cli("evaluate", nano_folder, *data, "--json", path).exit_code == 0
    return path


def test_table(carsam_cli, nano_folder, data, float_json):
    result = carsam_cli("evaluate", nano_folder, *data)
    scores = json.loads(float_json.read_text())
    lines = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if line.count("│") == 3}
    assert f" {scores['mean_iou']:.2f} " in lines["mean IoU"]
    low, high = scores["mean_iou_interval"]
    assert f" {low:.1f} to {high:.1f} " in lines["95 % interval over images"]
    assert f" {scores['segm_ap50']:.2f} " in lines["segm AP50"]
    assert f" {scores['segm_ap_large']:.2f} " in lines["segm AP, large"]
    assert f"AP rests on {scores['n_objects']} objects; with fewer than 200" in result.stdout
    assert max(map(len, result.stdout.splitlines())) < 100


def test_json_alone_on_stdout(carsam_cli, nano_folder, data, float_json):
    result = carsam_cli("evaluate", nano_folder, *data, "--json", "-")
    scores, expected = json.loads(result.stdout), json.loads(float_json.read_text())
    assert {**scores, "seconds": 0} == {**expected, "seconds": 0}
    assert "segm AP50" in result.stderr


def test_quiet(carsam_cli, nano_folder, data):
    result = carsam_cli("evaluate", nano_folder, *data, "--quiet")
    assert result.exit_code == 0 and not result.stderr and "mean IoU" in result.stdout
    result = carsam_cli("evaluate", nano_folder, *data, "--quiet", "--json", "-")
    assert not result.stderr and json.loads(result.stdout)["n_images"] == LIMIT


@pytest.mark.parametrize("kind", ["json", "results", "model"])
def test_difference_to_float(kind, made, carsam_cli, nano_folder, data, float_json, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "packed")
    source = {"json": float_json, "model": nano_folder, "results": folder / "results.json"}[kind]
    scores = json.loads(float_json.read_text())
    if kind == "results":
        source.write_text(json.dumps({**read_results(folder), "float_evaluation": scores}))
    result = carsam_cli("evaluate", folder, *data, "--float", source, "--json", tmp_path / "s.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "s.json").read_text())
    difference = found["difference_to_float"]["mean_iou"]
    assert difference["value"] == pytest.approx(found["mean_iou"] - scores["mean_iou"])
    assert difference["low"] <= difference["value"] <= difference["high"] and difference["n_images"] == LIMIT
    assert f"mean IoU differs from float by {difference['value']:+.2f} points" in result.stdout
    assert f" {scores['mean_iou']:.2f} " in result.stdout
    saved = read_results(folder)
    assert saved["evaluation"]["mean_iou"] == found["mean_iou"]
    if kind == "model":
        assert saved["float_evaluation"]["mean_iou"] == scores["mean_iou"]


def test_float_scores_of_other_data(carsam_cli, nano_folder, data, float_json, tmp_path):
    scores = json.loads(float_json.read_text())
    for score in scores["per_image"]:
        score["name"] = "other-" + score["name"]
    (tmp_path / "other.json").write_text(json.dumps(scores))
    result = carsam_cli("evaluate", nano_folder, *data, "--float", tmp_path / "other.json")
    assert result.exit_code == 0 and "fewer than two images with prompts are common" in result.stderr
    scores = json.loads(float_json.read_text())
    scores["per_image"][0]["ious"].append(50.0)
    (tmp_path / "other.json").write_text(json.dumps(scores))
    result = carsam_cli("evaluate", nano_folder, *data, "--float", tmp_path / "other.json")
    assert result.exit_code == 0 and "needs the same data" in result.stderr
    assert "differs from float" not in result.stdout


def test_old_name_of_detections(carsam_cli, nano_folder, evaluation_folder, data, tmp_path):
    truth = json.loads((evaluation_folder / "instances.json").read_text())
    detections = [
        {**{key: a[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.9}
        for a in truth["annotations"]
        if not a["iscrowd"]
    ]
    (tmp_path / "d.json").write_text(json.dumps(detections))
    new, old = (carsam_cli("evaluate", nano_folder, *data, flag, tmp_path / "d.json") for flag in NAMES)
    assert new.exit_code == old.exit_code == 0
    assert [line for line in new.stdout.splitlines() if "│" in line] == [
        line for line in old.stdout.splitlines() if "│" in line
    ]
    assert "--boxes is now --detections" in old.stderr and "now" not in new.stderr


NAMES = ("--detections", "--boxes")


def test_a_packed_folder_of_somebody_else(made, carsam_cli, data, tmp_path, monkeypatch):
    """The scores are shown and written; that results.json cannot be is a warning."""
    import carsam.commands.evaluate as command

    folder = shutil.copytree(made[0], tmp_path / "packed")
    before = (folder / "results.json").read_bytes()

    def denied(path, **_):
        raise CarsamError(f"cannot write {path / 'results.json'}: Permission denied.")

    monkeypatch.setattr(command, "merge_results", denied)
    result = carsam_cli("evaluate", folder, *data, "--json", tmp_path / "s.json")
    assert result.exit_code == 0
    assert "mean IoU" in result.stdout and (tmp_path / "s.json").is_file()
    assert "warning: " in result.stderr and "Permission denied" in result.stderr and "--no-save" in result.stderr
    assert (folder / "results.json").read_bytes() == before


@pytest.mark.parametrize("content", ["[" * 100_000, '{"quantization": {"loss": NaN}}', "[1]", "no"])
def test_a_damaged_results_file(content, made, carsam_cli, data, tmp_path):
    """Told, or replaced; the scores are shown in any case."""
    folder = shutil.copytree(made[0], tmp_path / "packed")
    (folder / "results.json").write_text(content)
    result = carsam_cli("evaluate", folder, *data, "--limit", 1)
    assert result.exit_code == 0 and "mean IoU" in result.stdout
    saved = "not saved" not in result.stderr
    assert saved == ("evaluation" in (folder / "results.json").read_text())


def test_json_over_an_input(carsam_cli, nano_folder, evaluation_folder, tmp_path):
    coco = shutil.copy(evaluation_folder / "instances.json", tmp_path / "c.json")
    arguments = ["--coco", coco, "--images", evaluation_folder / "images", "--json", tmp_path / "." / "c.json"]
    result = carsam_cli("evaluate", nano_folder, *arguments)
    assert result.exit_code == 1 and "would overwrite the file that is read from" in result.stderr
    assert coco.read_bytes() == (evaluation_folder / "instances.json").read_bytes()


def test_a_place_for_json_that_cannot_be_written(carsam_cli, nano_folder, data, tmp_path, monkeypatch):
    """Told before the first prediction."""
    monkeypatch.setattr(carsam.evaluate.coco_metrics, "evaluate_coco", None)
    (tmp_path / "file").write_text("")
    for place, words in ((tmp_path, "is a folder"), (tmp_path / "file" / "s.json", "cannot be written")):
        result = carsam_cli("evaluate", nano_folder, *data, "--json", place)
        assert result.exit_code == 1 and words in result.stderr


def test_interrupted_and_resumed(carsam_cli, nano_folder, data, float_json, monkeypatch, cache_folder):
    evaluate = carsam.evaluate.coco_metrics.evaluate_coco

    def stopping(*args, progress, **kwargs):
        def advance(done, total):
            progress(done, total)
            if done == 3:
                raise KeyboardInterrupt

        return evaluate(*args, progress=advance, **kwargs)

    monkeypatch.setattr(carsam.evaluate.coco_metrics, "evaluate_coco", stopping)
    result = carsam_cli("evaluate", nano_folder, *data)
    assert result.exit_code == 130
    assert "3 of 4 images are kept. Run the same command again to go on" in result.stderr
    monkeypatch.undo()
    monkeypatch.setenv("CARSAM_CACHE", str(cache_folder))
    result = carsam_cli("evaluate", nano_folder, *data, "--json", "-")
    assert "3 of 4 images are kept from an interrupted evaluation" in result.stderr
    assert {**json.loads(result.stdout), "seconds": 0} == {**json.loads(float_json.read_text()), "seconds": 0}
    assert not list((cache_folder / "evaluations").rglob("*.jsonl"))


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_killed_process_is_resumed_by_another(nano_folder, evaluation_folder, tmp_path):
    """The key of the kept images must be the same in every process."""
    code = (
        "import os, signal, sys\n"
        "sys.argv[0] = 'carsam'\n"
        "import carsam.evaluate.coco_metrics as module\n"
        "evaluate, stop = module.evaluate_coco, int(os.environ['STOP'])\n"
        "def killed(*args, progress, **kwargs):\n"
        "    def advance(done, total):\n"
        "        if done == stop: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return evaluate(*args, progress=advance, **kwargs)\n"
        "module.evaluate_coco = killed\n"
        "from carsam.cli import main\n"
        "main()\n"
    )
    arguments = ["evaluate", nano_folder, "--coco", evaluation_folder / "instances.json", "--limit", "3"]
    arguments += ["--images", evaluation_folder / "images", "--device", "cpu"]
    outputs = []
    for stop in ("2", "0"):
        environment = {**os.environ, "STOP": stop, "CARSAM_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        outputs.append(subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300))
    assert outputs[0].returncode == -signal.SIGKILL
    assert outputs[1].returncode == 0, outputs[1].stderr
    assert "2 of 3 images are kept from an interrupted evaluation" in outputs[1].stderr
    assert not list(tmp_path.rglob("*"))
