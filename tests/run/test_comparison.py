"""The comparison: rows, caching, the table."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from carsam.config import CalibrationConfig
from carsam.errors import ConfigError
from carsam.methods.rtn import Rtn
from carsam.run import comparison as module
from carsam.run import measured
from carsam.run.comparison import (
    Comparison,
    Published,
    compare,
)

PUBLISHED = {"name": "CAR-SAM", "bits": "w4a4", "segm_ap": 39.3, "source": "arXiv 2605.16901"}


@pytest.fixture
def recipe(nano_folder, calibration_folder, evaluation_folder):
    fast = {"weight_observer": "min-max", "activation_observer": "min-max"}
    return {
        "model": str(nano_folder),
        "calibration": {
            "images": str(calibration_folder / "images"),
            "coco": str(calibration_folder / "instances.json"),
            "n_images": 2,
            "boxes_per_image": 2,
        },
        "coco": str(evaluation_folder / "instances.json"),
        "images": str(evaluation_folder / "images"),
        "rows": [
            {"name": "fine", "method": "rtn", "settings": fast, "overrides": {"*": "w8a8"}},
            {"name": "coarse", "method": "rtn", "settings": fast},
        ],
        "bits": ["w4a4"],
    }


def test_a_comparison_measures_packed_models_once(recipe, tmp_path, monkeypatch):
    comparison = Comparison.from_dict(recipe)
    notes = []
    result = compare(comparison, tmp_path, note=notes.append)
    assert [m.row for m in result.measurements] == ["fine", "coarse"] and len(notes) == 3
    fine, coarse = result.measurements
    assert fine.bytes > coarse.bytes and fine.scores["mean_iou"] > coarse.scores["mean_iou"]
    assert result.floating["mean_iou"] >= fine.scores["mean_iou"] - 2
    assert not list(tmp_path.glob("packed*")), "packed models are not left behind"
    assert (tmp_path / "table.md").read_text() == result.to_markdown() + "\n"

    def never(*_args, **_kwargs):
        raise AssertionError("quantized again")

    monkeypatch.setattr(module, "quantize_and_measure", never)
    assert compare(comparison, tmp_path) == result
    # Another seed is another measurement, and names do not matter.
    with pytest.raises(AssertionError, match="again"):
        compare(replace(comparison, seeds=(1,)), tmp_path)
    renamed = replace(comparison, rows=(replace(comparison.rows[0], name="other"), comparison.rows[1]))
    assert compare(renamed, tmp_path).measurements[0].scores == fine.scores


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [{"name": "x", "method": "gptq"}]}, "unknown method"),
        ({"rows": [{"name": "x", "method": "rtn", "setings": {}}]}, "setings"),
        ({"rows": [{"name": "x", "method": "rtn", "settings": {"steps": 1}}]}, "unknown setting"),
        ({"bits": ["w4"]}, "cannot read the bits"),
        ({"bits": [4]}, r"bits\[0\]' must be text, not 4"),
        ({"seeds": [0, "1"]}, r"seeds\[1\]' must be a whole number, not '1'"),
        ({"rows": [{"name": "x", "method": ["rtn"]}]}, "must be text"),
        ({"seed": 1}, "unknown setting"),
        ({"rows": []}, "rows must be a list with at least one entry"),
        ({"rows": [{"method": "rtn"}]}, r"'rows\[0\]\.name' is missing"),
        ({"published": PUBLISHED}, "must be a list"),
        ({"published": [{"name": "CAR-SAM"}]}, r"'published\[0\]\.bits' is missing"),
        ({"published": [{**PUBLISHED, "segm_ap": "39.3"}]}, r"'published\[0\]\.segm_ap' must be a number, not '39\.3'"),
        ({"published": [{**PUBLISHED, "bits": "4"}]}, "cannot read the bits"),
    ],
)
def test_mistakes_are_found_before_anything_runs(recipe, change, message):
    with pytest.raises(ConfigError, match=message):
        Comparison.from_dict({**recipe, **change})
    del recipe["coco"]
    with pytest.raises(ConfigError, match="coco"):
        Comparison.from_dict(recipe)


def test_notes_come_from_the_method_and_published_numbers_from_the_recipe(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Rtn, "notes", "nearest", raising=False)
    found = {"segm_ap": 10.0, "box_ap": 20.0, "mean_iou": 30.0, "bytes": 1, "per_image": [], "n_objects": 1}
    found["quantization"] = {"units": [], "seconds": 1.0, "peak_memory_bytes": 1}
    monkeypatch.setattr(module, "_cached", lambda *_: found)
    result = compare(Comparison.from_dict({**recipe, "published": [PUBLISHED]}), tmp_path)
    assert [m.notes for m in result.measurements] == ["nearest", "nearest"]
    assert result.published == (Published(**PUBLISHED),)
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    assert "published, SAM-B" in (tmp_path / "table.md").read_text()


def test_two_methods_with_equal_settings_are_two_measurements(recipe, tmp_path, monkeypatch):
    keys = []
    found = {"segm_ap": 10.0, "box_ap": 20.0, "mean_iou": 30.0, "bytes": 1, "per_image": [], "n_objects": 1}
    found["quantization"] = {"units": [], "seconds": 1.0, "peak_memory_bytes": 1}
    monkeypatch.setattr(module, "_cached", lambda _folder, key, _compute: keys.append(key) or found)

    monkeypatch.setattr(module, "create", lambda _name, settings: Rtn(**settings))
    comparison = Comparison.from_dict(recipe)
    rows = tuple(replace(comparison.rows[1], method=name) for name in ("rtn", "its-twin"))
    compare(replace(comparison, rows=rows), tmp_path)
    assert len(set(keys)) == 3


def test_a_failed_measurement_leaves_nothing_behind(recipe, tmp_path, monkeypatch):
    def broken(*_arguments, **_options):
        raise RuntimeError("broken")

    comparison = Comparison.from_dict({**recipe, "rows": recipe["rows"][:1]})
    floating = {"segm_ap": 10.0, "box_ap": 20.0, "mean_iou": 30.0, "bytes": 1, "per_image": [], "n_objects": 1}
    monkeypatch.setattr(module, "_measure_float", lambda *_: floating)
    monkeypatch.setattr(measured, "evaluate_coco", broken)
    with pytest.raises(RuntimeError, match="broken"):
        compare(comparison, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"rows", "units"}
    assert len(list((tmp_path / "rows").iterdir())) == 1


def test_two_processes_share_a_work_folder(recipe, tmp_path):
    file, work = tmp_path / "recipe.yaml", tmp_path / "work"
    file.write_text(yaml.safe_dump({**recipe, "published": [PUBLISHED]}))
    flags = ["compare", "--recipe", str(file), "--out", str(work), "--device", "cpu"]
    command = [sys.executable, "-m", "carsam.cli", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pair = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert all(f"| W4A4 | {row} |" in output for output in outputs for row in ("fine", "coarse"))
    assert {path.name for path in work.iterdir()} <= {"rows", "units", "result.json", "table.md"}
    assert len(list((work / "rows").iterdir())) == 3
    assert len(json.loads((work / "result.json").read_text())["measurements"]) == 2


def test_calibration_of_a_comparison_is_the_pipelines(recipe):
    assert Comparison.from_dict(recipe).calibration == CalibrationConfig(**recipe["calibration"])


def test_rows_follow_contents_and_damaged_rows_are_measured_again(recipe, evaluation_folder, tmp_path, caplog):
    """Another file at the same path is other data; a row that was cut off or altered is not believed."""
    annotations = json.loads((evaluation_folder / "instances.json").read_text())
    coco = tmp_path / "instances.json"
    coco.write_text(json.dumps(annotations))
    comparison = Comparison.from_dict({**recipe, "coco": str(coco), "rows": recipe["rows"][1:]})
    work = tmp_path / "work"
    first = compare(comparison, work)

    rows = sorted((work / "rows").iterdir())
    rows[0].write_text(rows[0].read_text().replace('"mean_iou": ', '"mean_iou": 1'))
    rows[1].write_text(rows[1].read_text()[:50])
    assert compare(comparison, work).floating == first.floating
    assert caplog.text.count("measured again") == 2

    kept = {image["id"] for image in annotations["images"][:4]}
    annotations["annotations"] = [a for a in annotations["annotations"] if a["image_id"] in kept]
    coco.write_text(json.dumps(annotations))
    second = compare(comparison, work)
    assert second.floating["mean_iou"] != first.floating["mean_iou"]
    assert second.measurements[0].scores["mean_iou"] != first.measurements[0].scores["mean_iou"]
    assert len(list((work / "rows").iterdir())) == 4
