"""Charts are well-formed SVG, named, and survive any value."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from carsam.report.charts import (
    BarRow,
    Cell,
    Dot,
    DotRow,
    MapRow,
    Series,
    bar_rows,
    bit_map,
    bits_class,
    columns,
    dot_rows,
    histogram,
    line_chart,
    swatch,
)
from carsam.report.svg import Scale

NAMES = {"name": "c", "title": "A < B & C", "desc": 'It\'s "so"'}
ROUGH = [None, math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-320, 1e308]


def parse(svg):
    """The SVG as a tree; fails where it is not well-formed."""
    return ET.fromstring(str(svg))


def texts(tree):
    return [e.text for e in tree.iter("text")]


def charts(values):
    """Every kind of chart with these values."""
    points = list(enumerate(values))
    yield line_chart([Series("s", points, "float", "circle", "end")], **NAMES)
    yield line_chart([Series("s", points, "float")], log=False, **NAMES)
    yield line_chart([Series("s", [(v, 1.0) for v in values], "float")], **NAMES)
    yield dot_rows([DotRow("a", [Dot(v, "float")]) for v in values], **NAMES)
    yield dot_rows([DotRow("a", [Dot(v, "float") for v in values], "t", joined=True)], log=True, **NAMES)
    yield bar_rows([BarRow("a", "t", [(v, "float")]) for v in values], **NAMES)
    yield bit_map([MapRow("r", [Cell("l", "w", True, v, v, "t") for v in values])], **NAMES)


@pytest.mark.parametrize("values", [[], ROUGH, *([v] for v in ROUGH), [1.0], [2.0, 2.0], [1e-9, 1.0], [-5.0, 7.0]])
def test_any_values(values):
    for svg in charts(values):
        tree = parse(svg)
        assert tree.get("role") == "img"
        assert tree.get("aria-labelledby") == "c-title" and tree.get("aria-describedby") == "c-desc"
        assert tree.find("title").text == "A < B & C" and tree.find("desc").text == 'It\'s "so"'
        drawn = " ".join(value for e in tree.iter() for value in e.attrib.values())
        assert not re.search(r"\bnan\b|\binf\b", drawn), svg


def test_line_chart_places_points_on_a_log_scale():
    points = [(1.0, 1.0), (2.0, 10.0), (3.0, 100.0)]
    tree = parse(line_chart([Series("s", points, "float", "circle")], **NAMES))
    coordinates = [tuple(map(float, p.split(","))) for p in tree.find(".//polyline").get("points").split()]
    assert [x for x, _ in coordinates] == [0, 500, 1000]
    first, middle, last = (y for _, y in coordinates)
    assert first > middle > last and middle == pytest.approx((first + last) / 2)
    assert {"1", "10", "100"} <= set(texts(tree))


def test_line_chart_has_a_gap_where_a_value_is_missing():
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, None), (3.0, 0.0), (4.0, 3.0), (5.0, 1.0)]
    tree = parse(line_chart([Series("s", points, "float", "square")], **NAMES))
    assert [len(e.get("points").split()) for e in tree.iter("polyline")] == [2, 2]
    assert len([e for e in tree.iter("svg") if e.get("class") == "marker float"]) == 4


def test_dot_rows_join_and_order():
    dots = [Dot(10.0, "float"), Dot(40.0, "quantized", "square"), Dot(90.0, "head", "tick")]
    tree = parse(dot_rows([DotRow("a < b", dots, "v", joined=True)], low=0.0, high=100.0, **NAMES))
    joint = next(e for e in tree.iter("line") if e.get("class") == "joint")
    place = {e.get("class"): e.get("x") for e in tree.iter("svg") if e.get("class", "").startswith("marker")}
    # Ticks are not joined.
    assert (joint.get("x1"), joint.get("x2")) == (place["marker float"], place["marker quantized"])
    assert {"a < b", "v", "0", "100"} <= set(texts(tree))


def test_bar_rows_share_a_scale():
    tree = parse(bar_rows([BarRow("a", "8 → 2", [(8.0, "float"), (2.0, "quantized")])], **NAMES))
    assert [e.get("width") for e in tree.iter("rect") if e.get("class").startswith("bar")] == ["100%", "25%"]


def test_columns_say_their_counts():
    tree = parse(columns([0, 3, 1], 0, 30, **NAMES))
    assert len(list(tree.iter("rect"))) == 2
    assert texts(tree)[:2] == ["3", "1"]


def test_histogram_shades_what_the_grid_clips():
    tree = parse(histogram([1, 5, None, math.nan, 0, 2, 2, 2], -4.0, 4.0, title="t", grid_low=-2.0, grid_high=9.0))
    (outside,) = tree.iter("rect")
    assert (outside.get("x"), outside.get("width")) == ("0.0", "2.0")
    assert tree.find("title").text == "t"


@pytest.mark.parametrize("arguments", [([], 0, 1), ([0, 0], 0, 1), ([1], None, 1), ([1], 1, 1), ([1], 2, 1)])
def test_histogram_of_nothing(arguments):
    assert histogram(*arguments, title="t") == ""


def test_bit_map_labels_every_cell():
    cells = [Cell("qkv", "in", False, 4, 0.1, "input <1>"), Cell("qkv", "w", True, 8.0, None, "weights")]
    tree = parse(bit_map([MapRow("block 0", cells), MapRow("block 1", cells)], **NAMES))
    groups = list(tree.iter("g"))
    assert [g.get("class") for g in groups] == ["cell b4", "cell b8"] * 2
    assert [g.find("title").text for g in groups[:2]] == ["input <1>", "weights"]
    assert [g.find("text").text for g in groups] == ["4", "8"] * 2
    # Headings once: both rows have the same cells. Only the first cell of each row has an error.
    assert texts(tree).count("qkv") == 1
    assert sum(e.get("class") == "error" for e in tree.iter("rect")) == 2


def test_bits_have_classes():
    found = [bits_class(bits) for bits in (2, 3, 4, 5, 6, 8, 16, None, math.nan)]
    assert found == ["b3", "b3", "b4", "b6", "b6", "b8", "b16", "b16", "b16"]


def test_swatches_are_decoration():
    for svg in (swatch("float", "circle"), swatch("bar float", "", curve=False), swatch("head", "tick", curve=False)):
        assert parse(svg).get("aria-hidden") == "true"


@pytest.mark.parametrize(
    ("scale", "most", "expected"),
    [
        (Scale(0.0, 100.0), 5, ["0", "20", "40", "60", "80", "100"]),
        (Scale(-0.1, 0.12), 5, ["−0.10", "−0.05", "0.00", "0.05", "0.10"]),
        (Scale(1e-4, 20.0, log=True), 5, ["1e-4", "0.01", "1"]),
        (Scale(1e-3, 1.0, log=True), 5, ["0.001", "0.01", "0.1", "1"]),
        (Scale(0.03, 0.3, log=True), 5, ["0.05", "0.1", "0.2"]),
    ],
)
def test_ticks(scale, most, expected):
    assert [label for _, label in scale.ticks(most)] == expected
