"""Arithmetic of boxes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from carsam.data.boxes import clip_boxes, xywh_to_xyxy

SIZE = (30, 40)


def test_clip_boxes_by_hand():
    boxes = [
        [1, 1, 5, 5],
        [-5, -5, 5, 5],  # partly outside
        [50, 1, 60, 5],  # outside
        [40, 1, 60, 5],  # touches the right border
        [5, 5, 5, 9],  # no width
        [9, 9, 5, 12],  # turned
        [np.nan, 0, 5, 5],
        [0, 0, np.inf, 5],
        [-10, -10, 100, 100],
    ]
    clipped, usable = clip_boxes(np.array(boxes), SIZE)
    assert clipped[usable].tolist() == [[1, 1, 5, 5], [0, 0, 5, 5], [0, 0, 40, 30]]
    assert clip_boxes(np.array(boxes), SIZE, min_area=25)[1].tolist() == [False, True] + 6 * [False] + [True]
    assert clip_boxes(np.zeros((0, 4)), SIZE)[0].shape == (0, 4)


def test_unknown_size_clips_at_left_and_top_only():
    clipped, usable = clip_boxes(np.array([[-5, -5, 500, 600], [-9, 0, -1, 5]]), None)
    assert clipped[0].tolist() == [0, 0, 500, 600]
    assert usable.tolist() == [True, False]


numbers = st.floats(-100, 200) | st.sampled_from([0.0, 30.0, 40.0, float("nan"), float("inf")])


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=8))
def test_clip_boxes_properties(boxes):
    clipped, usable = clip_boxes(np.array(boxes, dtype=np.float64).reshape(-1, 4), SIZE)
    assert clipped.shape == (len(boxes), 4) and usable.shape == (len(boxes),)
    kept = clipped[usable]
    assert ((kept[:, 2:] - kept[:, :2]) > 0).all()
    assert (kept >= 0).all() and (kept <= [40, 30, 40, 30]).all()
    again, still = clip_boxes(kept, SIZE)
    assert still.all() and np.array_equal(again, kept)


def test_xywh_to_xyxy():
    assert xywh_to_xyxy([(1, 2, 3, 4)]).tolist() == [[1, 2, 4, 6]]
    assert xywh_to_xyxy([]).shape == (0, 4)
