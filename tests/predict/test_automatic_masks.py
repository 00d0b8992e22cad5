"""Masks of everything: the records of segment-anything's generator, without that package."""

import meta_sam
import numpy as np
import pytest
from pycocotools import mask as mask_utils

import carsam
from carsam.data.images.reading import read_image
from carsam.predict.automatic_masks import crop_boxes, remove_small_regions

# Below the best of the embedded model's masks, which the defaults would leave out.
THRESHOLDS = {"points_per_side": 8, "pred_iou_thresh": 0.2, "stability_score_thresh": 0.3}


@pytest.fixture(scope="module")
def image(evaluation_folder):
    return read_image(evaluation_folder / "images" / "000000000885.jpg")


@pytest.fixture(scope="module")
def records(nano, image):
    return carsam.SamAutomaticMaskGenerator(nano, **THRESHOLDS).generate(image)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"crop_n_layers": 1, "crop_n_points_downscale_factor": 2},
        {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "stability_score_offset": 0.5, "points_per_batch": 7},
        {"points_per_side": None, "point_grids": [np.array([[0.5, 0.5], [0.9, 0.1]])], "stability_score_thresh": 0.0},
        {"output_mode": "uncompressed_rle", "box_nms_thresh": 0.3},
        {"output_mode": "coco_rle"},
    ],
    ids=lambda settings: "+".join(settings) or "defaults",
)
def test_the_records_are_segment_anythings(nano, image, settings):
    settings = {**THRESHOLDS, **settings}
    sam = carsam.as_segment_anything(nano)
    expected = meta_sam.package().SamAutomaticMaskGenerator(sam, **settings).generate(image)
    actual = carsam.SamAutomaticMaskGenerator(nano, **settings).generate(image)
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected):
        assert list(a) == list(b)
        assert np.array_equal(a.pop("segmentation"), b.pop("segmentation"))
        assert a["stability_score"] == pytest.approx(b.pop("stability_score"), abs=1e-6)
        a.pop("stability_score")
        assert a == b


def test_records(records, image):
    for record in records:
        mask = record["segmentation"]
        assert mask.shape == image.shape[:2] and mask.dtype == bool
        assert record["area"] == mask.sum() > 0
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        box = [columns[0], rows[0], columns[-1] - columns[0], rows[-1] - rows[0]]
        assert record["bbox"] == box
        assert record["crop_box"] == [0, 0, image.shape[1], image.shape[0]]
        assert record["predicted_iou"] > 0.2 and 0.3 <= record["stability_score"] <= 1
    scores = [record["predicted_iou"] for record in records]
    assert scores == sorted(scores, reverse=True)


def test_chunks_do_not_change_the_masks(nano, image, records, monkeypatch):
    monkeypatch.setattr("carsam.predict.automatic_masks.CHUNK_PIXELS", 1)
    again = carsam.SamAutomaticMaskGenerator(nano, **THRESHOLDS).generate(image)
    assert len(again) == len(records)
    assert all(np.array_equal(a["segmentation"], b["segmentation"]) for a, b in zip(again, records))


def test_rle_decodes_to_the_mask(nano, image, records):
    generator = carsam.SamAutomaticMaskGenerator(nano, **THRESHOLDS, output_mode="coco_rle")
    for record, expected in zip(generator.generate(image), records):
        assert np.array_equal(mask_utils.decode(record["segmentation"]).astype(bool), expected["segmentation"])


def test_small_regions(nano, image):
    settings = {**THRESHOLDS, "stability_score_thresh": 0.0}
    records = carsam.SamAutomaticMaskGenerator(nano, **settings).generate(image)
    # A point gives three masks, which their predicted IoU tells apart.
    plain = {r["predicted_iou"]: r["segmentation"] for r in records}
    cleaned = carsam.SamAutomaticMaskGenerator(nano, **settings, min_mask_region_area=50).generate(image)
    changed = 0
    for record in cleaned:
        before = plain[record["predicted_iou"]]
        assert np.array_equal(remove_small_regions(record["segmentation"], 50), record["segmentation"])
        assert record["area"] == record["segmentation"].sum()
        changed += not np.array_equal(before, record["segmentation"])
    assert changed > 0


def test_remove_small_regions():
    mask = np.zeros((20, 20), bool)
    mask[2:12, 2:12] = True
    mask[5, 5] = mask[6, 6] = False  # one hole of two pixels, which touch at a corner
    mask[16, 16] = mask[17, 17] = True
    mask[0, 18] = True
    cleaned = remove_small_regions(mask, 3)
    assert cleaned[5, 5] and cleaned[6, 6] and not cleaned[16, 16] and not cleaned[0, 18]
    assert cleaned.sum() == 100
    assert remove_small_regions(mask, 2)[16, 16] and not remove_small_regions(mask, 2)[0, 18]
    # Where every piece is small, the largest stays.
    assert remove_small_regions(mask & (np.arange(20) > 12), 5).sum() == 2
    assert not remove_small_regions(np.zeros((4, 4), bool), 5).any()


def test_crops():
    crops = list(crop_boxes((100, 200), 2, 0.25))
    assert crops[0] == ((0, 0, 200, 100), 0)
    assert [layer for _, layer in crops] == [0] + [1] * 4 + [2] * 16
    assert crops[1][0] == (0, 0, 113, 63) and crops[4][0] == (88, 38, 200, 100)
    # A small image has fewer.
    assert all(left < right and top < bottom for (left, top, right, bottom), _ in crop_boxes((3, 2), 3, 0.5))


def test_nothing_found(nano, image):
    """The defaults are for Meta's models; this one is never that sure."""
    assert carsam.SamAutomaticMaskGenerator(nano, points_per_side=4, crop_n_layers=1).generate(image) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points_per_side": None}, "points_per_side or point_grids"),
        ({"point_grids": [np.zeros((1, 2))]}, "points_per_side or point_grids"),
        ({"points_per_side": None, "point_grids": [np.array([[5, 5]])]}, "on 0..1"),
        ({"points_per_side": None, "point_grids": [np.array([[0.5, float("nan")]])]}, "on 0..1"),
        ({"points_per_side": None, "point_grids": [np.zeros((1, 2))], "crop_n_layers": 1}, "needs 2 grids"),
        ({"points_per_side": 0}, "leaves no point"),
        ({"points_per_side": 4, "crop_n_layers": 2, "crop_n_points_downscale_factor": 4}, "leaves no point in layer 2"),
        ({"output_mode": "png"}, "uncompressed_rle"),
        ({"points_per_batch": 0}, "points_per_batch"),
        ({"crop_overlap_ratio": 1.5}, "crop_overlap_ratio"),
    ],
)
def test_settings_are_checked(nano, settings, message):
    with pytest.raises(ValueError, match=message):
        carsam.SamAutomaticMaskGenerator(nano, **settings)


def test_the_image_is_checked(nano):
    with pytest.raises(ValueError, match=r"carsam\.read_image"):
        carsam.SamAutomaticMaskGenerator(nano).generate("photo.jpg")
