"""COCO files, valid and not."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from carsam.data.coco.detections import load_detections
from carsam.data.coco.instances import CocoInstances
from carsam.errors import DataError

SQUARE = [10, 5, 20, 5, 20, 15, 10, 15]


def annotation(**changes):
    return {
        "id": 1,
        "image_id": 7,
        "category_id": 3,
        "bbox": [10, 5, 10, 10],
        "segmentation": [SQUARE],
        "iscrowd": 0,
        **changes,
    }


def dataset(*annotations):
    return {
        "images": [{"id": 7, "file_name": "a.png", "height": 30, "width": 40}],
        "annotations": list(annotations),
        "categories": [{"id": 3, "name": "cat"}],
    }


@pytest.fixture
def write(tmp_path):
    def _write(content, name="instances.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return _write


def test_boxes_and_masks(write):
    mask = np.zeros((30, 40), dtype=np.uint8, order="F")
    mask[2:4, 3:9] = 1
    compressed = mask_utils.encode(mask)
    compressed["counts"] = compressed["counts"].decode()
    edges = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=0, append=0))
    plain = {"size": [30, 40], "counts": np.diff(edges, prepend=0, append=mask.size).tolist()}
    coco = CocoInstances.from_file(
        write(
            dataset(
                annotation(),
                annotation(id=2, bbox=[3, 2, 6, 2], segmentation=compressed),
                annotation(id=3, iscrowd=1),
                annotation(id=4, bbox=[3, 2, 6, 2], segmentation=plain),
            )
        )
    )
    assert coco.boxes(7).tolist() == [[10, 5, 20, 15], [3, 2, 9, 4], [3, 2, 9, 4]]
    masks = coco.masks(7)
    assert masks.shape == (3, 30, 40) and masks.dtype == bool
    assert masks[0].sum() == 100 and masks[0, 5:15, 10:20].all()
    assert np.array_equal(masks[1], mask.astype(bool)) and np.array_equal(masks[2], mask.astype(bool))
    assert len(coco.annotations[7]) == 4 and len(coco.instances(7)) == 3


def test_no_annotations_and_foreign_ones(write):
    coco = CocoInstances.from_file(write(dataset(annotation(image_id=99))))
    assert coco.boxes(7).shape == (0, 4) and coco.masks(7).shape == (0, 30, 40)
    with pytest.raises(DataError, match="id 99"):
        coco.image(99)


def test_categories_only_in_annotations_are_added(write):
    coco = CocoInstances.from_file(write({**dataset(annotation(category_id=5)), "categories": []}))
    assert [c.id for c in coco.categories] == [5]


def without(entry, key):
    return {k: v for k, v in entry.items() if k != key}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "is a list"),
        ("3", "no 'images' and no 'annotations'"),
        ({"images": []}, "no 'annotations'"),
        ({"images": {}, "annotations": []}, "must be a list"),
        ({**dataset(), "images": [{"id": 7, "height": 3, "width": 4}]}, "image 0 .* no 'file_name'"),
        ({**dataset(), "images": [{"id": 7, "file_name": "a", "height": 0, "width": 4}]}, "positive"),
        ({**dataset(), "images": dataset()["images"] * 2}, "twice"),
        (dataset(without(annotation(), "bbox")), "annotation 0 .* no 'bbox'"),
        (dataset(annotation(bbox=[1, 2, 3])), "four finite numbers"),
        (dataset(annotation(bbox=[1, 2, 3, "4"])), "four finite numbers"),
        (dataset(annotation(image_id=[7])), "image_id"),
        (dataset("annotation"), "annotation 0"),
    ],
)
def test_invalid_files(write, content, message):
    with pytest.raises(DataError, match=message):
        CocoInstances.from_file(write(content))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match="no file"):
        CocoInstances.from_file(tmp_path / "none.json")
    with pytest.raises(DataError, match="is a folder"):
        CocoInstances.from_file(tmp_path)


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        [],
        [[1, 2, 3, 4]],
        {"size": [30, 40]},
        {"size": [3, 4], "counts": "x"},
        [["a"] * 6],
        [3],
        {"size": [30, 40], "counts": mask_utils.encode(np.ones((99, 99), np.uint8, "F"))["counts"].decode()},
        {"size": [30, 40], "counts": [1]},
        {"size": [30, 40], "counts": 3},
    ],
)
def test_masks_need_a_segmentation(write, segmentation):
    coco = CocoInstances.from_file(write(dataset(annotation(segmentation=segmentation))))
    with pytest.raises(DataError, match=r"annotation 1 of image 'a\.png'"):
        coco.masks(7)


def test_read_image_follows_the_annotated_orientation(write, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    coco = CocoInstances.from_file(write(dataset()))
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png", exif=exif)
    assert coco.read_image(coco.images[0], tmp_path).shape == (30, 40, 3)
    Image.new("RGB", (30, 40)).save(tmp_path / "a.png", exif=exif)
    assert coco.read_image(coco.images[0], tmp_path).shape == (30, 40, 3)
    Image.new("RGB", (31, 40)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="40 × 31"):
        coco.read_image(coco.images[0], tmp_path)


def detection(**changes):
    return {"image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5, **changes}


def test_load_detections(write):
    (found,) = load_detections(write([detection()]))
    assert (found.image_id, found.category_id, found.bbox, found.score) == (7, 3, (1.0, 2.0, 3.0, 4.0), 0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "not valid JSON"),
        (dataset(), "not a list of detections"),
        ([], "no detections"),
        ([detection(), without(detection(), "score")], "detection 1 .* no 'score'"),
        ([detection(bbox=[1, 2])], "four finite numbers"),
        ([detection(score="high")], "score"),
        ("[" + json.dumps(detection(score=float("nan"))) + "]", "finite"),
        ([3], "detection 0"),
    ],
)
def test_invalid_detections(write, content, message):
    with pytest.raises(DataError, match=message):
        load_detections(write(content))


def test_missing_detections(tmp_path):
    with pytest.raises(DataError, match="no file"):
        load_detections(tmp_path / "none.json")
