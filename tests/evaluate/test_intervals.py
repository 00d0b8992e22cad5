"""Intervals over images: by hand, by coverage, and paired."""

import itertools
import tracemalloc

import numpy as np
import pytest

from carsam.errors import DataError
from carsam.evaluate import intervals
from carsam.evaluate.intervals import averaged, difference_interval, interval_of_means, mean_interval
from carsam.evaluate.scores import ImageScore


def scores(groups, names=None):
    names = names or [f"{i}.jpg" for i in range(len(groups))]
    return [ImageScore(n, float(np.mean(g)) if len(g) else None, tuple(map(float, g))) for n, g in zip(names, groups)]


def test_by_all_resamples():
    """Four images can be drawn in 256 ways; the quantiles of all of them are what 5,000 draws must come near to."""
    groups = [[10.0], [20.0, 40.0], [70.0], [90.0, 95.0, 100.0]]
    means = [np.mean(np.concatenate(draw)) for draw in itertools.product(groups, repeat=4)]
    expected = np.quantile(means, [0.025, 0.975])
    assert mean_interval(groups) == pytest.approx(expected, abs=1.5)
    assert mean_interval(groups) == mean_interval(groups)
    assert interval_of_means([sum(g) for g in groups], [1, 2, 1, 3]) == mean_interval(groups)


def test_images_are_drawn_not_prompts():
    """Ten equal prompts of an image are one image's evidence."""
    few, many = [[20.0], [80.0], [50.0]], [[20.0] * 10, [80.0] * 10, [50.0] * 10]
    assert mean_interval(many) == mean_interval(few)


def test_images_without_prompts_do_not_count():
    groups = [[10.0], [30.0, 20.0], [60.0]]
    assert mean_interval([[], *groups, []]) == mean_interval(groups)
    for too_few in ([], [[]], [[1.0, 2.0]], [[1.0, 2.0], []]):
        assert mean_interval(too_few) is None


def test_coverage(monkeypatch):
    """Of 200 samples of 50 images from a known distribution, about 95 % of the intervals hold its mean."""
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = mean_interval(random.beta(2, 2, (50, 1)))
        hits += low <= 0.5 <= high
    assert 178 <= hits <= 199


def test_a_paired_difference_is_sharper_than_two_intervals():
    random = np.random.default_rng(1)
    a = [random.uniform(0, 100, n) for n in random.integers(1, 5, 40)]
    b = [group - random.normal(2, 1, len(group)) for group in a]
    found = difference_interval(scores(b), scores(a))
    assert found.value == pytest.approx(np.mean(np.concatenate(b)) - np.mean(np.concatenate(a)))
    assert found.low < found.value < found.high and found.high - found.low < 1.2 and found.is_clear
    low, high = mean_interval(a)
    assert high - low > 8
    assert (found.n_images, found.n_prompts) == (40, sum(map(len, a)))
    assert difference_interval(scores(a), scores(b)).value == pytest.approx(-found.value)
    assert str(found) == f"{found.value:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def test_a_difference_of_nothing_is_not_clear():
    groups = [[10.0, 20.0], [30.0], [50.0]]
    found = difference_interval(scores(groups), scores(groups))
    assert (found.value, found.low, found.high, found.is_clear) == (0, 0, 0, False)


def test_only_common_images_count_and_json_is_read():
    a = scores([[10.0], [30.0], [80.0], []], ["a", "b", "c", "d"])
    b = [{"name": "c", "ious": [70.0]}, {"name": "b", "ious": [20.0]}, {"name": "e", "ious": [1.0]}]
    found = difference_interval(a, b)
    assert (found.value, found.low, found.high, found.n_images) == (10, 10, 10, 2)
    assert difference_interval(a, b[:1]) is None
    # A name that the file lists twice is paired by its order.
    twice = difference_interval(scores([[1.0], [2.0]], ["a", "a"]), scores([[0.0], [0.0]], ["a", "a"]))
    assert twice.value == 1.5


@pytest.mark.parametrize("entry", [{"name": 3, "ious": [1.0]}, {"name": "a", "ious": "x"}, {"name": "a"}, {}])
def test_what_is_no_score(entry):
    with pytest.raises(DataError, match="not a list of numbers"):
        difference_interval([entry], [])


def test_other_prompts():
    with pytest.raises(DataError, match=r"0.jpg was measured with 1 prompts in one result and 2"):
        difference_interval(scores([[1.0], [2.0]]), scores([[1.0, 3.0], [2.0]]))


def test_memory_is_bounded():
    tracemalloc.start()
    mean_interval(np.ones((5000, 1)))
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()


def test_averaged_is_the_mean_prompt_by_prompt():
    a = [{"name": "x", "ious": [10.0, 20.0]}, {"name": "y", "ious": []}, {"name": "x", "ious": [1.0]}]
    b = [{"name": "x", "ious": [30.0, 20.0]}, {"name": "y", "ious": []}, {"name": "x", "ious": [3.0]}]
    assert averaged([a, b]) == [
        {"name": "x", "ious": [20.0, 20.0]},
        {"name": "y", "ious": []},
        {"name": "x", "ious": [2.0]},
    ]
    with pytest.raises(DataError, match="different prompts"):
        averaged([a, b[:2]])
