"""Results and their JSON."""

import json
import math

import pytest

from carsam.errors import DataError
from carsam.evaluate.scores import (
    CocoResult,
    ImageScore,
    few_objects_note,
    interval_text,
    read_float_scores,
    score_text,
)

# What carsam 0.1.0 wrote at first.
OLD = {
    "segm_ap": 15.6,
    "box_ap": 41.1,
    "mean_iou": 42.1,
    "n_images": 2,
    "n_prompts": 3,
    "per_image": [
        {"name": "a.jpg", "mean_iou": 40.0, "ious": [30.0, 50.0]},
        {"name": "b.jpg", "mean_iou": None, "ious": []},
    ],
}


def test_old_results_are_read():
    result = CocoResult.from_dict({**OLD, "coco": "instances.json", "seconds": 1.2})
    assert result == CocoResult(
        15.6, 41.1, 42.1, 2, 3, (ImageScore("a.jpg", 40.0, (30.0, 50.0)), ImageScore("b.jpg", None, ()))
    )
    assert result.mean_iou_interval is None and result.segm_ap50 is None


def test_round_trip():
    new = {**OLD, "mean_iou_interval": [30.0, 50.5], "n_objects": 3, "segm_ap_small": 1.5, "notes": ["A note."]}
    result = CocoResult.from_dict(new)
    assert result.n_objects == 3 and result.segm_ap_small == 1.5 and result.notes == ("A note.",)
    assert CocoResult.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False))) == result


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"segm_ap": "15"}, "'segm_ap'"),
        ({"box_ap": float("nan")}, "'box_ap'"),
        ({"mean_iou": None}, "'mean_iou'"),
        ({"n_images": True}, "'n_images'"),
        ({"n_prompts": 10**400}, "'n_prompts'"),
        ({"per_image": {}}, "'per_image'"),
        ({"per_image": [3]}, "without a name"),
        ({"per_image": [{"name": "a.jpg", "ious": [None]}]}, "a.jpg"),
    ],
)
def test_damaged_results(change, words):
    with pytest.raises(DataError, match=words):
        CocoResult.from_dict({**OLD, **change})
    for values in ([], None, "x", 3):
        with pytest.raises(DataError, match="mapping"):
            CocoResult.from_dict(values)


def test_float_scores_of_a_file(tmp_path):
    path = tmp_path / "scores.json"
    for content in (OLD, {"evaluation": 1, "float_evaluation": OLD}):
        path.write_text(json.dumps(content))
        assert read_float_scores(path).mean_iou == 42.1
    for text, words in (
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
        ('{"evaluation": {}}', "no scores of a float model"),
        ("[]", "mapping"),
        ('{"float_evaluation": 3}', "mapping"),
        ('{"segm_ap": 3}', "'box_ap'"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            read_float_scores(path)
    with pytest.raises(DataError, match="cannot read"):
        read_float_scores(tmp_path / "none.json")


def test_texts():
    assert few_objects_note(1).startswith("AP rests on 1 object;")
    assert few_objects_note(199).startswith("AP rests on 199 objects;") and few_objects_note(200) is None
    assert score_text(None) == interval_text(None) == "-"
    assert score_text(12.345, 2) == "12.35" and interval_text((1.04, 20.06)) == "1.0 to 20.1"


def test_dsc_is_that_of_the_prompts():
    # 2I / (1 + I) of 30 and 50 percent.
    assert CocoResult.from_dict(OLD).dsc == pytest.approx((60 / 1.3 + 100 / 1.5) / 2)
    empty = CocoResult.from_dict({**OLD, "per_image": []})
    assert math.isnan(empty.dsc)
