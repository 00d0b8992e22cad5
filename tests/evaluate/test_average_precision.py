"""AP against pycocotools itself, and where COCO's cap of 100 detections would lie."""

import contextlib
import io
import time

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from carsam.data.coco.ground_truth import TrueObject
from carsam.evaluate.average_precision import Prediction, average_precision

SIDE = 240
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def rectangle(x, y, width, height):
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    return mask_utils.encode(mask)


def true_object(image, category, box, crowd=False):
    mask = rectangle(*box)
    return TrueObject(image, category, mask, tuple(map(float, box)), float(mask_utils.area(mask)), crowd)


def random_scene(seed, n_images=6, n_categories=3):
    """Overlapping rectangles of all sizes, some crowds; masks near them with equal scores among them, and strays."""
    random = np.random.default_rng(seed)
    objects, predictions = [], []
    for image in range(n_images):
        for _ in range(random.integers(0, 9)):
            x, y = random.integers(0, SIDE - 20, 2)
            width, height = random.integers(4, 130, 2)
            category = int(random.integers(n_categories))
            objects.append(true_object(image, category, (x, y, width, height), crowd=random.random() < 0.1))
            for _ in range(random.integers(0, 3)):
                dx, dy, dw, dh = random.integers(-3, 4, 4)
                box = (max(0, x + dx), max(0, y + dy), max(2, width + dw), max(2, height + dh))
                score = round(float(random.random()), 1)
                predictions.append(Prediction(image, category, rectangle(*box), score))
        stray = rectangle(*random.integers(0, 100, 2), *random.integers(2, 120, 2))
        predictions.append(Prediction(image, int(random.integers(n_categories + 1)), stray, float(random.random())))
    return objects, predictions


def plain_pycocotools(objects, predictions, kind):
    """The six numbers that COCOeval prints, in percent."""
    truth = COCO()
    annotations = [
        {"id": i, "image_id": o.image + 1, "category_id": o.category + 1, "segmentation": o.mask}
        | {"bbox": list(o.box), "area": o.area, "iscrowd": int(o.crowd)}
        for i, o in enumerate(objects, 1)
    ]
    images = sorted({o.image for o in objects} | {p.image for p in predictions})
    categories = sorted({o.category for o in objects} | {p.category for p in predictions})
    truth.dataset = {
        "info": {},
        "images": [{"id": i + 1, "height": SIDE, "width": SIDE} for i in images],
        "categories": [{"id": c + 1, "name": str(c)} for c in categories],
        "annotations": annotations,
    }
    key, convert = ("segmentation", dict) if kind == "segm" else ("bbox", lambda m: mask_utils.toBbox(m).tolist())
    results = [
        {"image_id": p.image + 1, "category_id": p.category + 1, "score": p.score, key: convert(p.mask)}
        for p in predictions
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm" if kind == "segm" else "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats[:6]


@pytest.mark.parametrize("seed", range(6))
def test_equals_pycocotools(seed):
    objects, predictions = random_scene(seed)
    found = average_precision(objects, predictions)
    assert found.capped is None
    for kind in ("segm", "box"):
        expected = plain_pycocotools(objects, predictions, kind)
        assert expected[0] > 5, "a scene without matches would show nothing"
        for name, value in zip(NAMES, expected.tolist()):
            assert found.values[f"{kind}_{name}"] == (None if value == -100 else pytest.approx(value, abs=1e-9))


def test_a_size_without_objects_has_no_ap():
    """pycocotools says -1, which printed as -100.00."""
    box = (10, 10, 20, 20)
    found = average_precision([true_object(0, 0, box)], [Prediction(0, 0, rectangle(*box), 0.5)])
    assert found.values["segm_ap_small"] == pytest.approx(100)
    assert found.values["segm_ap_medium"] is None and found.values["box_ap_large"] is None


def test_nothing_but_crowds_has_no_ap():
    crowd = true_object(0, 0, (0, 0, 50, 50), crowd=True)
    assert set(average_precision([crowd], []).values.values()) == {None}


def test_empty_masks_have_ap_0():
    objects = [true_object(0, 0, (10, 10, 20, 20))]
    empty = mask_utils.encode(np.zeros((SIDE, SIDE), dtype=np.uint8, order="F"))
    for predictions in ([], [Prediction(0, 0, empty, 0.9)]):
        values = average_precision(objects, predictions).values
        assert values["segm_ap"] == values["box_ap"] == 0


def grid_scene(count, category_of):
    """As many squares of 9 pixels side by side, each found exactly."""
    per_row = SIDE // 12
    places = [(12 * (i % per_row), 12 * (i // per_row) % SIDE, 9, 9) for i in range(count)]
    objects = [true_object(0, category_of(i), place) for i, place in enumerate(places)]
    return objects, [Prediction(0, o.category, o.mask, 0.5 + 0.4 * i / count) for i, o in enumerate(objects)]


def test_300_objects_of_one_class_count_as_300_objects_of_four():
    one = average_precision(*grid_scene(300, lambda i: 0))
    four = average_precision(*grid_scene(300, lambda i: i % 4))
    assert one.values["segm_ap"] == four.values["segm_ap"] == pytest.approx(100)
    assert four.capped is None
    # A third of the objects at full precision: 34 of 101 recall thresholds.
    assert one.capped["segm_ap"] == one.capped["box_ap"] == pytest.approx(100 * 34 / 101)
    expected = plain_pycocotools(*grid_scene(300, lambda i: 0), "segm")
    assert one.capped["segm_ap"] == pytest.approx(expected[0])


def test_many_objects_and_many_categories_take_seconds():
    """pycocotools itself compares 1.4e9 pairs in Python here, or lists 2e7 pairs of image and category."""
    started = time.process_time()
    objects, predictions = grid_scene(400, lambda i: 0)
    crowded = [TrueObject(i // 2000, 0, o.mask, o.box, o.area) for i, o in enumerate(objects * 5)]
    found = [Prediction(0, 0, p.mask, p.score) for p in predictions * 5]
    assert 0 < average_precision(crowded, found).values["segm_ap"] <= 100
    spread = [TrueObject(i, i, o.mask, o.box, o.area) for i, o in enumerate(objects)]
    exact = [Prediction(i, i, p.mask, p.score) for i, p in enumerate(predictions)]
    assert average_precision(spread, exact).values["segm_ap"] == pytest.approx(100)
    assert time.process_time() - started < 20
