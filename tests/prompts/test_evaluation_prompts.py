"""Box prompts: what does not fit the annotations stops the evaluation, or is said; nothing scores 0 in silence."""

import json

import pytest
from places import EVALUATION_COCO as COCO_FILE
from places import EVALUATION_IMAGES as IMAGES

from carsam.data.coco.ground_truth import GroundTruth
from carsam.data.coco.instances import CocoInstances
from carsam.errors import DataError
from carsam.prompts.evaluation import box_prompts


@pytest.fixture(scope="module")
def truth():
    return GroundTruth.from_file(COCO_FILE, IMAGES)


@pytest.fixture(scope="module")
def category_ids():
    return sorted(category.id for category in CocoInstances.from_file(COCO_FILE).categories)


def detections(tmp_path, change):
    """The objects' own boxes as detections, changed one by one; ``change`` gets the entry and its number."""
    content = json.loads(COCO_FILE.read_text())
    entries = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.5}
        for a in content["annotations"]
        if not a["iscrowd"]
    ]
    path = tmp_path / "detections.json"
    path.write_text(json.dumps([{**entry, **change(entry, i)} for i, entry in enumerate(entries)]))
    return path


def test_own_boxes(truth):
    prompts = box_prompts(truth)
    assert sum(map(len, prompts)) == truth.n_objects == 71
    first, item = prompts[0][0], truth.singles(0)[0]
    x, y, width, height = item.box
    assert first.box == pytest.approx((x, y, x + width, y + height))
    assert (first.category, first.score, first.target) == (item.category, 1.0, item.mask)


def test_good_detections_pass_without_a_word(truth, tmp_path, caplog):
    prompts = box_prompts(truth, detections(tmp_path, lambda entry, i: {"score": i / 100}))
    own = box_prompts(truth)
    for found, expected in zip(prompts, own):
        assert [(p.box, p.category) for p in found] == [(p.box, p.category) for p in expected]
        assert all(p.target is None for p in found)
    assert prompts[0][1].score == 0.01
    assert not caplog.records


def xyxy(entry, _):
    x, y, width, height = entry["bbox"]
    return {"bbox": [x, y, x + width, y + height]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e, i: {"category_id": 0}, "no category of the detections"),
        (lambda e, i: {"category_id": "person"}, "no category of the detections"),
        (lambda e, i: {"category_id": str(e["category_id"])}, "category_id '.*a number and a text never match"),
        (lambda e, i: {"image_id": str(e["image_id"])}, "image_id '.*a number and a text never match"),
        (lambda e, i: {"image_id": str(e["image_id"])} if i == 40 else {}, "image_id '.*never match"),
        (lambda e, i: {"image_id": 10**7 + i}, "none of the 71 detections"),
        (xyxy, "x1, y1, x2, y2"),
        (lambda e, i: {"bbox": [9000, 0, 5, 5]}, "no box prompt"),
    ],
)
def test_what_does_not_fit(change, words, truth, tmp_path):
    with pytest.raises(DataError, match=words):
        box_prompts(truth, detections(tmp_path, change))


def test_corners_that_stay_inside_the_image(truth, tmp_path):
    """Near the top left corner, x1, y1, x2, y2 taken as a width and height reaches over no border; the objects tell."""
    path = detections(tmp_path, xyxy)
    sizes = {image.id: image.size for image in truth.images}
    kept = [
        entry
        for entry in json.loads(path.read_text())
        if entry["bbox"][0] + entry["bbox"][2] < sizes[entry["image_id"]][1]
        and entry["bbox"][1] + entry["bbox"][3] < sizes[entry["image_id"]][0]
    ]
    assert len(kept) >= 5
    path.write_text(json.dumps(kept))
    with pytest.raises(DataError, match="as x1, y1, x2, y2, and only"):
        box_prompts(truth, path)


@pytest.mark.parametrize("first", [0, 1])
def test_categories_by_position(first, truth, category_ids, tmp_path):
    """Also where most are persons, whose position counted from 1 is their id."""
    path = detections(tmp_path, lambda e, i: {"category_id": category_ids.index(e["category_id"]) + first})
    with pytest.raises(DataError, match=f"positions, counted from {first}"):
        box_prompts(truth, path)


def test_one_category_for_all_is_said(truth, tmp_path, caplog):
    prompts = box_prompts(truth, detections(tmp_path, lambda e, i: {"category_id": 1}))
    assert sum(map(len, prompts)) == 71
    assert "have its category. A mask counts only in its own category" in caplog.text


def test_a_few_left_out_are_counted(truth, tmp_path, caplog):
    def change(entry, i):
        return {3: {"category_id": 999}, 5: {"image_id": 10**7}, 7: {"bbox": [5, 5, 0, 10]}}.get(i, {})

    prompts = box_prompts(truth, detections(tmp_path, change))
    assert sum(map(len, prompts)) == 68
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert lines[0].startswith("1 of 71 detections") and "10000000" in lines[0]
    assert lines[1].startswith("1 of 70 detections left out") and "999" in lines[1]
    assert lines[2].startswith("1 boxes without area")


def test_detections_beyond_the_limit_are_no_mistake(tmp_path, caplog):
    truth = GroundTruth.from_file(COCO_FILE, IMAGES, limit=2)
    prompts = box_prompts(truth, detections(tmp_path, lambda e, i: {}))
    assert sum(map(len, prompts)) == truth.n_objects == 20
    assert not caplog.records
