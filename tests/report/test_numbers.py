"""Numbers as the report prints them."""

import math

import pytest

from carsam.report import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *(
            (0, "0"),
            (0.0123456, "0.0123"),
            (12.345, "12.3"),
            (-4.5, "−4.50"),
            (123456, "123456"),
            (9.999e-5, "1.00e-4"),
        ),
        *((1.234e-5, "1.23e-5"), (-1.2e9, "−1.20e9"), (math.inf, "∞"), (-math.inf, "−∞")),
        *((math.nan, "–"), (None, "–"), ("text", "–"), (True, "–"), ([], "–")),
    ],
)
def test_number(value, text):
    assert numbers.number(value) == text


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (numbers.whole, 4.0, "4"),
        (numbers.whole, 4.5, "4.50"),
        (numbers.whole, None, "–"),
        (numbers.box, [0.0, 1.26, None, 300], "0, 1.30, –, 300"),
        (numbers.box, None, ""),
        (numbers.decimal, -0.04, "0.0"),
        (numbers.decimal, -16.44, "−16.4"),
        (numbers.signed, 1.23, "+1.2"),
        (numbers.signed, -1.23, "−1.2"),
        (numbers.signed, 0.04, "0.0"),
        (numbers.signed, math.nan, "–"),
        (numbers.percent, 0.1234, "12.3\u00a0%"),
        (numbers.percent, 0.0001, "<\u00a00.1\u00a0%"),
        (numbers.percent, 0.0, "0.0\u00a0%"),
        (numbers.percent, None, "–"),
        (numbers.count, 4058340, "4\u202f058\u202f340"),
        (numbers.size, 3_140_000, "3.1\u00a0MB"),
        (numbers.duration, 192, "3\u00a0min\u00a012\u00a0s"),
        (numbers.duration, None, "–"),
    ],
)
def test_others(function, value, text):
    assert function(value) == text


def test_plural():
    assert [numbers.plural(n, "image") for n in (1, 3)] == ["1\u00a0image", "3\u00a0images"]
