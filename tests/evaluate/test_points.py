"""Simulated clicks."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from places import EVALUATION_COCO as COCO_FILE
from places import EVALUATION_IMAGES as IMAGES

from carsam.data.coco.instances import CocoInstances
from carsam.errors import ConfigError, DataError, DeviceError
from carsam.evaluate import points
from carsam.evaluate.points import deepest_point, distance_to_boundary, evaluate_points, mask_iou, next_click


@pytest.fixture(scope="module")
def model(nano):
    return nano


@given(st.integers(1, 14), st.integers(1, 14), st.floats(0, 1), st.integers(0, 1000))
def test_distance_by_brute_force(height, width, share, seed):
    region = np.random.default_rng(seed).random((height, width)) < share
    outside = np.argwhere(~np.pad(region, 1)) - 1
    expected = np.zeros((height, width))
    for y, x in np.argwhere(region):
        expected[y, x] = np.sqrt(((outside - [y, x]) ** 2).sum(1).min())
    assert np.array_equal(distance_to_boundary(region), expected)


def test_deepest_point():
    region = np.zeros((40, 60), dtype=bool)
    region[10:21, 30:41] = True
    region[30:35, 5:55] = True
    assert deepest_point(region) == ((35.0, 15.0), 6.0)
    assert deepest_point(np.zeros((4, 4), dtype=bool))[1] == 0


def test_next_click():
    target = np.zeros((20, 20), dtype=bool)
    target[5:14, 5:14] = True
    assert next_click(target, np.zeros_like(target)) == ((9.0, 9.0), 1)
    assert next_click(target, target) is None
    surplus = target.copy()
    surplus[:, 14:] = True
    assert next_click(target, surplus)[1] == 0
    assert next_click(target, surplus)[0][0] >= 14


def test_mask_iou():
    a, b = np.zeros((4, 4), dtype=bool), np.zeros((4, 4), dtype=bool)
    assert mask_iou(a, b) == 1
    a[0], b[0, :2] = True, True
    assert mask_iou(a, b) == 0.5


def test_evaluation(model, tmp_path):
    calls = []
    result = evaluate_points(model, COCO_FILE, IMAGES, limit=2, clicks=(3, 1), progress=lambda *c: calls.append(c))
    assert list(result.mean_iou) == [1, 3] and all(0 <= iou <= 100 for iou in result.mean_iou.values())
    assert result.n_images == 2 and calls == [(1, 2), (2, 2)]
    result.save(tmp_path / "points.json")
    assert json.loads((tmp_path / "points.json").read_text())["mean_iou"]["1"] == result.mean_iou[1]
    assert "at 1 click, " in str(result) and "at 3 clicks" in str(result)
    small = evaluate_points(model, COCO_FILE, IMAGES, limit=2, clicks=(1, 3), prompts_per_batch=2)
    assert small.mean_iou == pytest.approx(result.mean_iou, abs=0.5)


def test_an_obedient_model_gets_better_with_clicks(model, monkeypatch, tmp_path):
    """A model that answers with discs around positive clicks, without those around negative ones."""
    seen = []

    def predict(model, embeddings, *, points, labels, masks, multimask_output):
        seen.append((points.shape[1], masks is None, multimask_output))
        centre = torch.arange(64) * 4.0 + 2
        logits = torch.full((len(points), 1, 64, 64), -1.0)
        for i in range(len(points)):
            for (x, y), label in zip(points[i], labels[i]):
                disc = (centre[None, :] - x) ** 2 + (centre[:, None] - y) ** 2 < 15**2
                logits[i, 0][disc] = 1.0 if label == 1 else -1.0
        return logits, torch.ones(len(points), 1)

    monkeypatch.setattr(points, "predict_logits", predict)
    Image.new("RGB", (256, 256)).save(tmp_path / "a.png")
    image = {"id": 1, "file_name": "a.png", "height": 256, "width": 256}
    square = {"image_id": 1, "category_id": 1, "bbox": [50, 50, 60, 60]}
    square["segmentation"] = [[50, 50, 110, 50, 110, 110, 50, 110]]
    (tmp_path / "c.json").write_text(json.dumps({"images": [image], "annotations": [square]}))
    result = evaluate_points(model, tmp_path / "c.json", tmp_path)
    assert result.mean_iou[1] < result.mean_iou[3] < result.mean_iou[5]
    assert seen == [(1, True, True), (2, False, False), (3, False, False), (4, False, False), (5, False, False)]


def test_errors(model, tmp_path):
    for clicks in ((), (0, 1)):
        with pytest.raises(ConfigError, match="clicks"):
            evaluate_points(model, COCO_FILE, IMAGES, clicks=clicks)
    instances = CocoInstances.from_file(COCO_FILE)
    first = instances.images[0]
    image = {"id": first.id, "file_name": first.file_name, "height": first.height, "width": first.width}
    (tmp_path / "c.json").write_text(json.dumps({"images": [image], "annotations": []}))
    with pytest.raises(DataError, match="no objects"):
        evaluate_points(model, tmp_path / "c.json", IMAGES)


def test_large_images_are_clicked_in_smaller_batches(model, monkeypatch):
    """Masks of a batch are in memory at once, so a photograph of 200 megapixels gets one object at a time."""
    whole = evaluate_points(model, COCO_FILE, IMAGES, limit=1, clicks=(1,), prompts_per_batch=1)
    sizes = []
    run = points._Session.run
    monkeypatch.setattr(
        points._Session, "run", lambda self, targets, c: sizes.append(len(targets)) or run(self, targets, c)
    )
    monkeypatch.setattr(points, "MAX_BATCH_PIXELS", 300_000)
    assert evaluate_points(model, COCO_FILE, IMAGES, limit=1, clicks=(1,)) == whole
    assert set(sizes) == {1}


def test_interval_over_images(model):
    result = evaluate_points(model, COCO_FILE, IMAGES, limit=3, clicks=(1, 2))
    for n in (1, 2):
        low, high = result.mean_iou_interval[n]
        assert low < result.mean_iou[n] < high
    assert sum(score.n_objects for score in result.per_image) == result.n_prompts
    assert evaluate_points(model, COCO_FILE, IMAGES, limit=1, clicks=(1,)).mean_iou_interval == {1: None}


def test_out_of_memory(model, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(points, "encode_image", full)
    with pytest.raises(DeviceError, match="too little free memory"):
        evaluate_points(model, COCO_FILE, IMAGES, limit=1)
