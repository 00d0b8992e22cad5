"""J and F against trackeval, which follows DAVIS's own code, and against masks whose values are known."""

import numpy as np
import pytest

from carsam.evaluate.video_measures import boundary, contour_accuracy, region_similarity, summarise

SHAPE = (90, 120)


def disc(y, x, radius):
    rows, columns = np.ogrid[: SHAPE[0], : SHAPE[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


@pytest.fixture(scope="module")
def masks():
    """(found, true), each (40, h, w): discs that drift apart, cross the border, vanish, and noise."""
    rng = np.random.default_rng(7)
    found, true = [], []
    for index in range(40):
        true.append(disc(40 + index, 30 + 2 * index, 18))
        found.append(disc(40 + index + rng.integers(-4, 5), 28 + 2 * index, 15 + rng.integers(0, 9)))
    found[3][:], true[4][:], found[5][:], true[5][:] = False, False, False, False
    found[6], true[7] = rng.random(SHAPE) > 0.5, rng.random(SHAPE) > 0.9
    found[8][:] = True
    found[9], true[9] = found[9] & False, found[9] & False
    found[9][-1, -1] = true[9][0, 0] = True
    return np.array(found), np.array(true)


def test_equal_to_trackeval(masks):
    pytest.importorskip("cv2")
    pytest.importorskip("skimage")
    metrics = pytest.importorskip("trackeval.metrics")
    from pycocotools import mask as mask_utils

    def encoded(stack):
        return [[mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))] for mask in stack]

    found, true = masks
    data = {
        "num_timesteps": len(true),
        "num_tracker_ids": 1,
        "num_gt_ids": 1,
        "gt_dets": encoded(true),
        "tracker_dets": encoded(found),
        "gt_ids": [[0]] * len(true),
        "tracker_ids": [[0]] * len(true),
    }
    theirs = metrics.JAndF().eval_sequence(data)
    j = summarise([region_similarity(*pair) for pair in zip(found, true)])
    f = summarise([contour_accuracy(*pair) for pair in zip(found, true)])
    ours = {"J-Mean": j.mean, "J-Recall": j.recall, "J-Decay": j.decay}
    ours |= {"F-Mean": f.mean, "F-Recall": f.recall, "F-Decay": f.decay, "J&F": (j.mean + f.mean) / 2}
    # both are sums and quotients of counts of pixels: only the order of additions may differ
    assert ours == pytest.approx({name: theirs[name] for name in ours}, abs=1e-6)
    assert 0.2 < j.mean < 0.9 and 0.2 < f.mean < 0.9  # masks that tell something


def test_each_frame_equal_to_trackeval(masks):
    pytest.importorskip("cv2")
    pytest.importorskip("skimage")
    metrics = pytest.importorskip("trackeval.metrics")
    from pycocotools import mask as mask_utils

    found, true = ([[mask_utils.encode(np.asfortranarray(m.astype(np.uint8)))] for m in stack] for stack in masks)
    theirs = metrics.JAndF._compute_f(true, found, 0, 0, 0.008)
    assert [contour_accuracy(*pair) for pair in zip(*masks)] == pytest.approx(theirs.tolist(), abs=1e-6)


def test_empty_masks():
    nothing, something = np.zeros(SHAPE, bool), disc(40, 40, 9)
    assert region_similarity(nothing, nothing) == contour_accuracy(nothing, nothing) == 1
    assert region_similarity(something, nothing) == contour_accuracy(something, nothing) == 0
    assert region_similarity(something, something) == contour_accuracy(something, something) == 1
    everything = ~nothing  # no boundary: nothing differs from its neighbours
    assert contour_accuracy(everything, everything) == 1 and contour_accuracy(everything, something) == 0


def test_a_shift_within_the_tolerance_costs_nothing_beyond_it_everything():
    # 0.8 % of the diagonal of 150 px is 1.2 px, rounded up: 2
    square = np.zeros(SHAPE, bool)
    square[20:60, 20:60] = True
    assert contour_accuracy(np.roll(square, 2, 1), square) == 1
    assert contour_accuracy(np.roll(square, 3, 1), square) < 0.6  # both sides are off, top and bottom are not
    assert boundary(square).sum() == 160


def test_summary():
    values = [0.9] * 4 + [0.6] * 4 + [0.4] * 4 + [0.2] * 4
    found = summarise(values)
    assert found.mean == pytest.approx(0.525) and found.recall == 0.5
    # of 16 frames the quarters are 1 to 5 and 12 to 16
    assert found.decay == pytest.approx((0.9 * 4 + 0.6) / 5 - (0.4 + 0.2 * 4) / 5)
    assert summarise([0.7]).decay == 0
    with pytest.raises(ValueError, match="no frames"):
        summarise([])
