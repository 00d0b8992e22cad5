"""Boxes of another form, told by the objects' masks or by the images' borders."""

import logging

import numpy as np
import pytest

from carsam.data.coco.box_form import BoxSample, check_boxes
from carsam.errors import DataError

SIZE = (300, 400)
# XYXY of objects.
OBJECTS = np.random.default_rng(5).uniform(20, 100, (30, 4)) + np.array((60, 40, 130, 130))


def samples(convert, count=30, masks=True, size=SIZE):
    changed = [convert(*box) if i < count else (box[0], box[1], *(box[2:] - box[:2])) for i, box in enumerate(OBJECTS)]
    return [
        BoxSample(f"annotation {i}", tuple(map(float, box)), size, OBJECTS[i] if masks else None)
        for i, box in enumerate(changed)
    ]


def xywh(a, b, c, d):
    return a, b, c - a, d - b


def shares(box):
    return np.array(box) / [400, 300, 400, 300]


FORMS = {
    "x1, y1, x2, y2, but": lambda *b: b,
    "centre x, centre y, width, height, but": lambda a, b, c, d: ((a + c) / 2, (b + d) / 2, c - a, d - b),
    "x, y, width, height as shares": lambda *b: shares(xywh(*b)),
    "x1, y1, x2, y2 as shares": lambda *b: shares(b),
    "as YOLO has them": lambda a, b, c, d: shares(((a + c) / 2, (b + d) / 2, c - a, d - b)),
    "in percent of the image": lambda *b: 100 * shares(xywh(*b)),
    "x1, y1, x2, y2 as thousandths": lambda *b: 1000 * shares(b),
    "y1, x1, y2, x2 as thousandths": lambda *b: 1000 * shares(b)[[1, 0, 3, 2]],
    "y, x, height, width": lambda a, b, c, d: (b, a, d - b, c - a),
}


@pytest.mark.parametrize("form", FORMS)
def test_masks_tell_the_form(form, caplog):
    with pytest.raises(DataError, match=rf"of 30 boxes in c.json contradict the mask .*look like.*{form}"):
        check_boxes(samples(FORMS[form]), "c.json")
    with caplog.at_level(logging.WARNING):
        check_boxes(samples(FORMS[form], count=3), "c.json")
    assert "3 of 30 boxes" in caplog.text and len(caplog.records) == 1


def test_valid_boxes_pass_in_silence(caplog):
    check_boxes(samples(xywh), "c.json")
    check_boxes(samples(xywh, masks=False), "c.json")
    # Loose, rounded, cut off at the border, without area.
    odd = [(10, 10, 50, 50), (-5, 0, 30, 40), (390, 280, 12, 25), (5, 5, 0, 9)]
    check_boxes([BoxSample("a", box, SIZE, np.array([15.0, 14, 52, 58])) for box in odd[:1]], "c.json")
    check_boxes([BoxSample("a", box, SIZE) for box in odd], "c.json")
    check_boxes([], "c.json")
    # A small object's mask and box differ by more than half, in pixels that do not count.
    check_boxes([BoxSample("a", (10, 10, 4, 4), SIZE, np.array([11.0, 11, 13, 13]))], "c.json")
    assert not caplog.records


def test_boxes_that_nothing_explains(caplog):
    with pytest.raises(DataError, match=r"30 of 30 boxes in c.json contradict .*; do boxes and masks belong"):
        check_boxes(samples(lambda a, b, c, d: (300, 10, 30, 20)), "c.json")
    with caplog.at_level(logging.WARNING):
        check_boxes(samples(lambda a, b, c, d: (300, 10, 30, 20), count=9), "c.json")
    assert "9 of 30 boxes in c.json contradict" in caplog.text and "look like" not in caplog.text


def test_borders_tell_without_masks(caplog):
    with pytest.raises(DataError, match=r"all 30 boxes .*shares of the image"):
        check_boxes(samples(FORMS["x, y, width, height as shares"], masks=False), "c.json")
    wide = samples(lambda a, b, c, d: (a + 100, b + 50, c + 100, d + 50), masks=False)
    with pytest.raises(DataError, match=r"30 of 30 boxes .*look like x1, y1, x2, y2"):
        check_boxes(wide, "c.json")
    with pytest.raises(DataError, match=r"images of another size"):
        check_boxes(samples(lambda *b: [3 * v for v in xywh(*b)], masks=False), "c.json")
    with caplog.at_level(logging.WARNING):
        check_boxes(samples(lambda *b: [3 * v for v in xywh(*b)], count=4, masks=False), "c.json")
    assert "4 of 30 boxes in c.json reach far outside their image (first: annotation 0" in caplog.text


def test_masks_that_were_cut_off_with_their_boxes():
    # Drawn on an image twice as large: what the mask keeps of the object is what the border leaves of the box.
    boxes = [BoxSample("a", (150.0, 90, 500, 400), SIZE, np.array([150.0, 90, 400, 300])) for _ in range(12)]
    with pytest.raises(DataError, match=r"12 of 12 boxes .* images of another size"):
        check_boxes(boxes, "c.json")
