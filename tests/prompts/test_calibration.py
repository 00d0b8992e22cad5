"""The choice of calibration images and boxes."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from places import CALIBRATION_COCO as COCO
from places import CALIBRATION_IMAGES as IMAGES

from carsam.data.coco.instances import CocoInstances
from carsam.errors import ConfigError, DataError
from carsam.prompts import proposals
from carsam.prompts.calibration import calibration_set
from carsam.prompts.proposals import (
    box_iou,
    grid_boxes,
    mask_boxes,
    non_maximum_suppression,
    propose_boxes,
    stability_score,
)


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


def test_a_wrong_folder_is_an_error_in_one_line(model, tmp_path, caplog):
    Image.new("RGB", (9, 9)).save(tmp_path / "other.png")
    with pytest.raises(DataError, match=r"24 of the 24 images .* are not in .* give the folder"):
        calibration_set(model, tmp_path, coco=COCO)
    assert not caplog.records


def test_skipped_images_are_counted_in_one_line(model, tmp_path, caplog):
    paths = copy_images(tmp_path, 8)
    for path in paths[:3]:
        path.write_bytes(b"broken")
    chosen = calibration_set(model, tmp_path, coco=COCO, n_images=4)
    lines = [record.getMessage() for record in caplog.records]
    assert len(chosen.images) == 4 and len(lines) == 1
    assert lines[0].startswith(f"{chosen.skipped} calibration images skipped: ")


def test_other_spellings_give_the_same_data(model, tmp_path):
    content = json.loads(COCO.read_text())
    for image in content["images"]:
        image["file_name"] = "C:\\data\\" + image["file_name"]
        image["height"] = float(image["height"])
    (tmp_path / "coco.json").write_text(json.dumps(content))
    found = calibration_set(model, IMAGES, coco=tmp_path / "coco.json", n_images=4)
    assert found.fingerprint == calibration_set(model, IMAGES, coco=COCO, n_images=4).fingerprint


def test_sizes_that_are_missing_are_read(model, tmp_path):
    content = json.loads(COCO.read_text())
    for image in content["images"]:
        del image["height"], image["width"]
    (tmp_path / "coco.json").write_text(json.dumps(content))
    found = calibration_set(model, IMAGES, coco=tmp_path / "coco.json", n_images=4)
    assert found.fingerprint == calibration_set(model, IMAGES, coco=COCO, n_images=4).fingerprint


def test_masks_are_not_needed(model, tmp_path):
    content = json.loads(COCO.read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    (tmp_path / "coco.json").write_text(json.dumps(content))
    found = calibration_set(model, IMAGES, coco=tmp_path / "coco.json", n_images=4)
    assert found.fingerprint == calibration_set(model, IMAGES, coco=COCO, n_images=4).fingerprint


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda x, y, w, h, size: [x, y, x + w, y + h], "look like x1, y1, x2, y2"),
        (lambda x, y, w, h, size: [x / size[0], y / size[1], w / size[0], h / size[1]], "shares of the image"),
    ],
)
@pytest.mark.parametrize("with_masks", [True, False])
def test_boxes_of_another_form(model, tmp_path, convert, message, with_masks):
    content = json.loads(COCO.read_text())
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for annotation in content["annotations"]:
        annotation["bbox"] = convert(*annotation["bbox"], sizes[annotation["image_id"]])
        if not with_masks:
            annotation["segmentation"] = None
    (tmp_path / "coco.json").write_text(json.dumps(content))
    if not with_masks and message.startswith("look"):
        pytest.skip("borders alone do not tell here")
    with pytest.raises(DataError, match=message):
        calibration_set(model, IMAGES, coco=tmp_path / "coco.json", n_images=2)


def test_boxes_follow_the_orientation_that_fits_them(model, tmp_path, caplog):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png", exif=exif)
    # Drawn upright (48 × 64), with the stored size noted.
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 48, "width": 64}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 24, 64]}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    chosen = calibration_set(model, tmp_path, coco=tmp_path / "coco.json")
    assert chosen.images[0].boxes.tolist() == [[0, 0, 96, 256]]
    assert "1 of 1 calibration images have boxes that fit only with width and height swapped" in caplog.text


def test_deep_pixels_are_said_once(model, tmp_path, caplog):
    for path in copy_images(tmp_path, 3):
        values = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16
        Image.fromarray(values).save(path.with_suffix(".png"))
        path.unlink()
    chosen = calibration_set(model, tmp_path, box_source="grid")
    assert [r.getMessage() for r in caplog.records if "16 bits" in r.getMessage()] == [
        f"3 of 3 calibration images use 12 of 16 bits and were scaled by 4095 (first: {chosen.images[0].name})."
    ]
    # The 8-bit pixels gave the same up to rounding.
    assert chosen.images[0].pixel_values.std() > 0.5
