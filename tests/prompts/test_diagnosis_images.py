"""Images, prompts and references of a diagnosis."""

import json
import shutil

import numpy as np
import pytest

from carsam.data.coco.instances import CocoInstances
from carsam.errors import ConfigError, DataError
from carsam.prompts.calibration import CalibrationSet
from carsam.prompts.diagnosis import diagnosis_images


@pytest.fixture(scope="module")
def samples(nano, evaluation_folder):
    images, coco = evaluation_folder / "images", evaluation_folder / "instances.json"
    return diagnosis_images(nano, images, coco=coco, limit=2, prompts=2)


def test_coco_boxes_and_masks(samples, evaluation_folder):
    instances = CocoInstances.from_file(evaluation_folder / "instances.json")
    first = instances.images[0]
    sample = samples[0]
    assert sample.name == first.file_name
    assert sample.read().shape[:2] == sample.geometry.original_size == first.size
    for index, box in enumerate(sample.image_boxes):
        mask = sample.true_mask(index)
        assert mask.shape == first.size
        rows, columns = np.nonzero(mask)
        tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(box - tight).max() <= 3
    scale = 256 / max(first.size)
    assert np.allclose(sample.boxes.numpy(), sample.image_boxes * scale, atol=1)


def test_proposed_boxes(nano, evaluation_folder):
    (sample,) = diagnosis_images(nano, evaluation_folder / "images", coco=None, limit=1, prompts=3)
    assert sample.name == min(path.name for path in (evaluation_folder / "images").iterdir())
    assert sample.truth is None
    assert sample.true_mask(0) is None
    assert 1 <= len(sample.image_boxes) <= 3
    height, width = sample.geometry.original_size
    assert (sample.image_boxes >= 0).all()
    assert (sample.image_boxes <= [width, height, width, height]).all()


def test_as_calibration_set(samples):
    data = CalibrationSet.of(samples)
    assert [image.name for image in data.images] == [sample.name for sample in samples]
    assert data.images[0].boxes.shape == (2, 4)


def test_unreadable_images_are_skipped(nano, evaluation_folder, tmp_path, caplog):
    source = min((evaluation_folder / "images").iterdir())
    (tmp_path / "a.jpg").write_bytes(b"no image")
    shutil.copy(source, tmp_path / "b.jpg")
    (sample,) = diagnosis_images(nano, tmp_path, coco=None, limit=8, prompts=1)
    assert sample.name == "b.jpg"
    assert "a.jpg" in caplog.text


def test_nothing_to_look_at(nano, evaluation_folder, tmp_path):
    images = evaluation_folder / "images"
    with pytest.raises(ConfigError, match="at least one image"):
        diagnosis_images(nano, images, coco=None, limit=0, prompts=1)
    with pytest.raises(DataError, match="missing"):
        diagnosis_images(nano, tmp_path / "missing", coco=None, limit=1, prompts=1)
    with pytest.raises(DataError, match="missing"):
        diagnosis_images(nano, tmp_path / "missing", coco=evaluation_folder / "instances.json", limit=1, prompts=1)
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="can be read"):
        diagnosis_images(nano, tmp_path, coco=None, limit=1, prompts=1)
    values = json.loads((evaluation_folder / "instances.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps({**values, "annotations": []}))
    with pytest.raises(DataError, match=r"no image in .* has an object"):
        diagnosis_images(nano, images, coco=tmp_path / "empty.json", limit=1, prompts=1)
