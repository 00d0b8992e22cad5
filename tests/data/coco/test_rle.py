"""Run lengths against pycocotools."""

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from carsam.data.coco.rle import counts_area, counts_box, counts_to_mask, counts_to_rle, mask_to_counts

RANDOM = np.random.default_rng(0)
MASKS = {
    "noise": RANDOM.random((13, 9)) < 0.4,
    "empty": np.zeros((5, 7), bool),
    "full": np.ones((5, 7), bool),
    "one pixel": np.arange(35).reshape(5, 7) == 16,
    "first pixel": np.arange(35).reshape(5, 7) == 0,
    "last pixel": np.arange(35).reshape(5, 7) == 34,
    "two columns in one run": np.isin(np.arange(12), [3, 6]).reshape(4, 3) | (np.arange(12).reshape(4, 3) == 10),
    "1 x 1": np.ones((1, 1), bool),
}
MASKS["over the edge"] = np.zeros((4, 4), bool)
MASKS["over the edge"][3, 1] = MASKS["over the edge"][0, 2] = True


@pytest.mark.parametrize("name", MASKS)
def test_against_pycocotools(name):
    mask = MASKS[name]
    counts = mask_to_counts(mask)
    assert np.array_equal(counts_to_mask(counts, mask.shape), mask)
    expected = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert counts_to_rle(counts, mask.shape)["counts"].encode() == expected["counts"]
    assert counts_area(counts) == mask_utils.area(expected) == mask.sum()
    assert list(counts_box(counts, mask.shape)) == mask_utils.toBbox(expected).tolist()
