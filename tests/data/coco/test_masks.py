"""Segmentations: every form that tools write, and every value that must not reach pycocotools."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils

from carsam.data.coco import masks
from carsam.data.coco.masks import compressed_runs, tight_box, to_rle

SIZE = (30, 40)
SQUARE = [10, 5, 20, 5, 20, 15, 10, 15]
PAIRS = [[10, 5], [20, 5], [20, 15], [10, 15]]
POINTS = [{"x": x, "y": y} for x, y in PAIRS]


def expected():
    mask = np.zeros(SIZE, dtype=bool)
    mask[5:15, 10:20] = True
    return mask


@pytest.mark.parametrize(
    "form", [[SQUARE], SQUARE, [PAIRS], PAIRS, [POINTS], POINTS, [SQUARE, [1, 2, 3, 4]], [SQUARE, []]]
)
def test_forms_of_a_polygon(form):
    rle = to_rle(form, SIZE)
    assert np.array_equal(mask_utils.decode(rle).astype(bool), expected())
    assert tight_box(rle).tolist() == [10, 5, 20, 15]


def runs_of(mask):
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat.astype(int), prepend=0))
    return np.diff(edges, prepend=0, append=flat.size).tolist()


@pytest.mark.parametrize("convert", [int, float])
@pytest.mark.parametrize("size", [[30, 40], [30.0, 40.0]])
def test_forms_of_rle(convert, size):
    counts = [convert(run) for run in runs_of(expected())]
    plain = to_rle({"size": size, "counts": counts}, SIZE)
    packed = to_rle({"size": size, "counts": plain["counts"].decode()}, SIZE)
    for rle in (plain, packed):
        assert np.array_equal(mask_utils.decode(rle).astype(bool), expected())


@pytest.mark.parametrize("empty", [None, [], [[]], [[1, 2, 3, 4]], [[1, 2], [3, 4]], {"size": [30, 40], "counts": []}])
def test_no_mask(empty):
    assert to_rle(empty, SIZE) is None


def spoiled(value):
    return [[value, *SQUARE[1:]]]


def rle(counts, size=(30, 40)):
    return {"size": list(size), "counts": counts}


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (spoiled(math.nan), "nan, which is no coordinate"),
        (spoiled(math.inf), "inf, which is no coordinate"),
        (spoiled(None), "None, which is no coordinate"),
        (spoiled("10"), "'10', which is no coordinate"),
        (spoiled(True), "True, which is no coordinate"),
        (spoiled(False), "False, which is no coordinate"),
        (spoiled(2e8), "200000000.0, which is no coordinate"),
        (spoiled(10**400), "far too many digits"),
        (spoiled(1e6), "far outside an image of 40 × 30"),
        (spoiled(-5000), "-5000, far outside"),
        ([SQUARE, [1, 2, 3, 4, 5, math.nan]], "nan"),
        ([SQUARE[:-1]], "7 numbers"),
        ([SQUARE, 3], "a polygon is 3"),
        ([[[1, 2, 3], [4, 5, 6]]], r"a point of a polygon is \[1, 2, 3\]"),
        ([[{"x": 1}] * 3], "a point of a polygon"),
        ("polygon", "it is 'polygon'"),
        (7, "it is 7"),
        ({"size": [30, 40]}, "it is {'size'"),
        (rle([1200], (40, 30)), "may be swapped"),
        (rle([1200], (31, 40)), r"size \[31, 40\]"),
        (rle([1200], "30x40"), "size"),
        (rle([1200], [30]), "size"),
        (rle([-5, 1205]), "-5; whole numbers"),
        (rle([600.5, 599.5]), "600.5; whole numbers"),
        (rle(["600", "600"]), "'600'; whole numbers"),
        (rle([None, 1200]), "None; whole numbers"),
        (rle([math.nan, 1200]), "nan; whole numbers"),
        (rle([10**400]), "whole numbers"),
        (rle([1199]), "counts 1199 pixels"),
        (rle([2**31, 2**31]), "pixels"),
        (rle(3), "its RLE counts are 3"),
        (rle("600 600"), "compressed form"),
        (rle("[600, 600]"), "compressed form"),
        (rle("ü"), "compressed form"),
        (rle("P"), "cut off"),
        (rle("oooooooooo0"), "more than 32 bits"),
        (rle("N2"), "a run of -2"),
        (rle(mask_utils.encode(np.ones((99, 99), np.uint8, "F"))["counts"].decode()), "counts 9801 pixels"),
    ],
)
def test_refused(segmentation, message):
    with pytest.raises(ValueError, match=message):
        to_rle(segmentation, SIZE)


def test_an_endless_outline_is_not_drawn(monkeypatch):
    monkeypatch.setattr(masks, "MAX_OUTLINE", 1000)
    with pytest.raises(ValueError, match=r"outline of a polygon is 1600 pixels"):
        to_rle([[0, 0, 40, 1] * 20], SIZE)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_compressed_runs_are_those_of_pycocotools(height, width, data):
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits).reshape(height, width)
    packed = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert compressed_runs(packed).tolist() == runs_of(mask)


def test_long_runs():
    mask = np.zeros((3000, 2000), dtype=np.uint8, order="F")
    mask[100:2900, 50:1900:7] = 1
    assert compressed_runs(mask_utils.encode(mask)["counts"].decode()).tolist() == runs_of(mask)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=[chr(c) for c in range(48, 112)], min_size=1, max_size=30))
def test_any_code_is_read_or_refused(counts):
    try:
        found = to_rle({"size": [30, 40], "counts": counts}, SIZE)
    except ValueError:
        return
    assert mask_utils.decode(found).shape == SIZE
