"""Polygons of masks, drawn again by pycocotools."""

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from scipy import ndimage

from carsam.data.coco.polygons import mask_to_polygons


def drawn(polygons, size):
    return mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(polygons, *size))).astype(bool)


def blob(seed, size=(80, 100), smooth=4.0, level=0.0):
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=size), smooth) > level


MASKS = {f"blobs {seed}": blob(seed) for seed in range(4)}
MASKS["fine blobs"] = blob(9, smooth=1.2)
MASKS["noise"] = np.random.default_rng(0).random((30, 40)) < 0.6
MASKS["full"] = np.ones((7, 5), bool)
MASKS["one pixel"] = np.arange(35).reshape(5, 7) == 16
MASKS["corners touch"] = np.eye(5, dtype=bool)
MASKS["rings"] = (np.hypot(*np.mgrid[-20:21, -20:21]) // 4 % 2).astype(bool)
MASKS["two holes in a row"] = np.ones((9, 15), bool)
MASKS["two holes in a row"][3:6, 3:6] = MASKS["two holes in a row"][4:7, 9:12] = False
MASKS["holes that touch"] = np.ones((8, 8), bool)
MASKS["holes that touch"][2, 2] = MASKS["holes that touch"][3, 3] = MASKS["holes that touch"][2, 4] = False


@pytest.mark.parametrize("name", MASKS)
def test_drawn_again_they_are_the_mask(name):
    mask = MASKS[name]
    polygons = mask_to_polygons(mask)
    assert np.array_equal(drawn(polygons, mask.shape), mask)
    assert len(polygons) == ndimage.label(mask)[1]
    for polygon in polygons:
        assert len(polygon) % 2 == 0 and len(polygon) >= 8
        assert all(isinstance(value, float) for value in polygon)


def test_a_rectangle_has_four_corners():
    mask = np.zeros((10, 12), bool)
    mask[2:5, 3:9] = True
    assert mask_to_polygons(mask) == [[3.0, 2.0, 9.0, 2.0, 9.0, 5.0, 3.0, 5.0]]


def test_an_empty_mask_has_none():
    assert mask_to_polygons(np.zeros((4, 4), bool)) == []
