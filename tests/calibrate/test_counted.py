"""Counting through several loops."""

from carsam.calibrate.counted import Count, uncounted


def test_loops_are_counted_together_also_where_items_are_skipped():
    seen = []
    counted = Count(5, lambda done, total: seen.append((done, total)))
    for item in counted("ab"):
        if item == "a":
            continue
    assert list(counted([1, 2, 3])) == [1, 2, 3]
    assert seen == [(done, 5) for done in range(6)]
    assert list(uncounted("ab")) == ["a", "b"]


def test_more_than_was_expected_is_not_told():
    seen = []
    list(Count(1, lambda *told: seen.append(told))("abc"))
    assert seen[-1] == (1, 1)
