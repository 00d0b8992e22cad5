"""The choice of calibration images and boxes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from carsam.data import proposals
from carsam.data.calibration import calibration_set
from carsam.data.coco import CocoInstances
from carsam.data.proposals import (
    box_iou,
    grid_boxes,
    mask_boxes,
    non_maximum_suppression,
    propose_boxes,
    stability_score,
)
from carsam.errors import ConfigError, DataError

EMBEDDED = Path(__file__).parents[2] / "embedded"
IMAGES = EMBEDDED / "images" / "calibration" / "images"
COCO = EMBEDDED / "images" / "calibration" / "instances.json"


@pytest.fixture(scope="module")
def model(nano):
    return nano


def test_boxes_are_the_annotated_ones(model):
    chosen = calibration_set(model, IMAGES, coco=COCO, n_images=5, boxes_per_image=3)
    coco = CocoInstances.from_file(COCO)
    by_name = {image.file_name: image for image in coco.images}
    assert len(chosen.images) == 5 and chosen.skipped == 0
    for image in chosen.images:
        assert image.pixel_values.shape == (1, 3, 256, 256) and image.pixel_values.dtype == torch.float32
        assert 1 <= len(image.boxes) <= 3 and image.boxes.dtype == torch.float32
        entry = by_name[image.name]
        annotated = torch.from_numpy(coco.boxes(entry.id)).float() * 256 / max(entry.size)
        distance = (image.boxes[:, None] - annotated[None]).abs().amax(-1)
        assert (distance.amin(1) < 1).all()
        assert len(image.boxes.unique(dim=0)) == len(image.boxes)


def test_the_seed_decides(model):
    def names(**settings):
        chosen = calibration_set(model, IMAGES, coco=COCO, n_images=6, **settings)
        return [image.name for image in chosen.images], chosen.fingerprint

    assert names() == names()
    assert names() != names(seed=1)
    assert names()[0] == names(boxes_per_image=1)[0] and names()[1] != names(boxes_per_image=1)[1]


def test_fewer_images_than_wanted(model):
    assert len(calibration_set(model, IMAGES, coco=COCO, n_images=1000).images) <= 25


def copy_images(folder, count):
    for path in sorted(IMAGES.glob("*.jpg"))[:count]:
        shutil.copy(path, folder / path.name)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("with_coco", [True, False])
def test_unreadable_images_are_skipped(model, tmp_path, with_coco):
    paths = copy_images(tmp_path, 5)
    paths[1].write_bytes(b"broken")
    chosen = calibration_set(
        model, tmp_path, coco=COCO if with_coco else None, n_images=25, box_source="grid", boxes_per_image=2
    )
    assert paths[1].name not in {image.name for image in chosen.images}
    # With annotations, the 20 images that were not copied are missing as well.
    missing = sum(len(CocoInstances.from_file(COCO).boxes(i.id)) > 0 for i in CocoInstances.from_file(COCO).images) - 5
    assert chosen.skipped == (missing + 1 if with_coco else 1)
    with pytest.raises(DataError, match=r"only 4 usable images .* at least 5 are needed; \d+ were skipped \("):
        calibration_set(model, tmp_path, coco=COCO if with_coco else None, n_images=25, box_source="grid", minimum=5)


def test_only_objects_that_count(model, tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    entry = {"image_id": 1, "category_id": 1, "iscrowd": 0}
    annotations = [
        {**entry, "bbox": [0, 0, 9, 9]},  # too small
        {**entry, "bbox": [70, 0, 30, 30]},  # outside
        {**entry, "bbox": [1, 1, 30, 30], "iscrowd": 1},
        {**entry, "bbox": [40, 20, 30, 40]},  # partly outside
        {**entry, "bbox": [40, 20, 30, 40]},  # the same again
    ]
    content = {"images": [{"id": 1, "file_name": "a.png", "height": 48, "width": 64}], "annotations": annotations}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    chosen = calibration_set(model, tmp_path, coco=tmp_path / "coco.json")
    assert chosen.images[0].boxes.tolist() == [[160, 80, 256, 192]]

    content["annotations"] = annotations[:3]
    (tmp_path / "coco.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="100 px²"):
        calibration_set(model, tmp_path, coco=tmp_path / "coco.json")


@pytest.mark.parametrize("source", ["auto", "grid"])
def test_without_annotations(model, tmp_path, source):
    copy_images(tmp_path, 2)
    chosen = calibration_set(model, tmp_path, box_source=source, boxes_per_image=7)
    for image in chosen.images:
        assert image.boxes.shape == (7, 4)
        assert (image.boxes[:, 2:] > image.boxes[:, :2]).all()
        assert (image.boxes >= 0).all() and (image.boxes <= 256).all()


@pytest.mark.parametrize("settings", [{"n_images": 0}, {"boxes_per_image": 0}, {"minimum": 40}, {"box_source": "x"}])
def test_settings_out_of_range(model, settings):
    with pytest.raises(ConfigError):
        calibration_set(model, IMAGES, **settings)


def test_missing_folders_and_files(model, tmp_path):
    with pytest.raises(DataError, match="no image folder"):
        calibration_set(model, tmp_path / "none")
    with pytest.raises(DataError, match="no image folder"):
        calibration_set(model, tmp_path / "none", coco=COCO)
    with pytest.raises(DataError, match="no images"):
        calibration_set(model, tmp_path)
    with pytest.raises(DataError, match="no file"):
        calibration_set(model, IMAGES, coco=tmp_path / "none.json")


def test_proposals_find_a_mask_that_the_model_is_sure_of(model, monkeypatch):
    target = torch.full((64, 64), -5.0)
    target[8:24, 16:40] = 5.0  # x 64..160, y 32..96 in the input frame

    def predict(model, embeddings, *, points, labels, multimask_output):
        assert multimask_output and len(points) <= proposals.POINTS_PER_BATCH
        return target.expand(len(points), 3, 64, 64), torch.full((len(points), 3), 0.9)

    monkeypatch.setattr(proposals, "predict_logits", predict)
    boxes = propose_boxes(model, torch.zeros(1, 3, 256, 256), (200, 256), 6)
    assert boxes.shape == (1, 4)
    assert (boxes - torch.tensor([[64.0, 32, 160, 96]])).abs().max() <= 1
    monkeypatch.setattr(proposals, "MIN_PREDICTED_IOU", 0.95)
    assert propose_boxes(model, torch.zeros(1, 3, 256, 256), (200, 256), 6).shape == (0, 4)


@given(st.integers(0, 30), st.integers(1, 300), st.integers(1, 300))
def test_grid_boxes(count, height, width):
    boxes = grid_boxes((height, width), count)
    assert boxes.shape == (count, 4) and len(boxes.unique(dim=0)) == count
    assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
    assert (boxes <= torch.tensor([width, height, width, height])).all()


def test_mask_boxes():
    masks = torch.zeros(2, 10, 12, dtype=torch.bool)
    masks[0, 3:5, 4:9] = True
    masks[1, 9, 11] = masks[1, 0, 2] = True
    assert mask_boxes(masks).tolist() == [[4, 3, 9, 5], [2, 0, 12, 10]]


def test_stability_score():
    logits = torch.tensor([[5.0, 5.0, 0.5, -0.5, -5.0]])
    assert stability_score(logits).item() == 0.5
    assert stability_score(torch.full((2, 4, 4), -9.0)).tolist() == [0, 0]


def test_non_maximum_suppression():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 30, 30], [0, 0, 10, 10]])
    assert box_iou(boxes[:1], boxes[1:2]).item() == pytest.approx(90 / 110)
    assert non_maximum_suppression(boxes, torch.tensor([0.5, 0.9, 0.1, 0.5]), 0.7).tolist() == [1, 2]
    assert non_maximum_suppression(boxes, torch.tensor([0.5, 0.9, 0.1, 0.5]), 0.9).tolist() == [1, 0, 2]
    assert non_maximum_suppression(boxes[:0], torch.zeros(0), 0.5).tolist() == []
    assert box_iou(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0
