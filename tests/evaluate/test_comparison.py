"""The comparison: rows, caching, the table."""

from dataclasses import replace

import pytest

from carsam.config import CalibrationConfig
from carsam.errors import ConfigError
from carsam.evaluate import comparison as module
from carsam.evaluate.comparison import Comparison, ComparisonResult, Measurement, compare, mean_and_spread


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

    def never(*_args, **_kwargs):
        raise AssertionError("quantized again")

    monkeypatch.setattr(module, "quantize", never)
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
        ({"seed": 1}, "unknown setting"),
    ],
)
def test_mistakes_are_found_before_anything_runs(recipe, change, message):
    with pytest.raises(ConfigError, match=message):
        Comparison.from_dict({**recipe, **change})
    del recipe["coco"]
    with pytest.raises(ConfigError, match="coco"):
        Comparison.from_dict(recipe)


def test_the_table_gives_mean_and_half_the_range():
    assert mean_and_spread([1.0]) == "1.0" and mean_and_spread([1.0, 2.0, 4.0]) == "2.3 ± 1.5"
    scores = {"segm_ap": 10.0, "box_ap": 20.0, "mean_iou": 30.0}
    rows = tuple(
        Measurement("rtn", "w4a4", seed, {**scores, "mean_iou": 30.0 + seed}, 6_000_000, 5.0, 1) for seed in (0, 1)
    )
    table = ComparisonResult({**scores, "bytes": 17_000_000}, rows).to_markdown().splitlines()
    assert table[2] == "| float | | 10.0 | 20.0 | 30.0 | 17.0 MB | |"
    assert table[3] == "| W4A4 | rtn | 10.0 ± 0.0 | 20.0 ± 0.0 | 30.5 ± 0.5 | 6.0 MB | 5 s |"


def test_calibration_of_a_comparison_is_the_pipelines(recipe):
    assert Comparison.from_dict(recipe).calibration == CalibrationConfig(**recipe["calibration"])
