"""What fell and what rose: prompts of two evaluations side by side."""

import json
import re
import shutil

import pytest
from test_page import words

from carsam.report.changes import find_changes
from carsam.report.page import render
from carsam.report.source import read_source


def scores(**ious):
    return {"per_image": [{"name": name, "ious": values} for name, values in ious.items()]}


def test_what_changed():
    found = find_changes(scores(a=[10.0, 50.0, 30.5], b=[70.0]), scores(a=[40.0, 50.5, 20.0], b=[72.0]))
    assert found.difference.value == pytest.approx((10 + 50 + 30.5 + 70 - 40 - 50.5 - 20 - 72) / 4)
    assert found.difference.low <= found.difference.value <= found.difference.high
    assert (found.n_fell, found.n_rose, found.n_alike) == (2, 1, 1)
    assert [(each.image, each.prompt, each.change) for each in found.fell] == [("a", 1, -30.0), ("b", 1, -2.0)]
    assert [(each.image, each.prompt, each.change) for each in found.rose] == [("a", 3, 10.5)]
    assert [(each.image, round(each.change, 2)) for each in found.images] == [("a", -6.67), ("b", -2.0)]


def test_one_image_has_no_interval():
    found = find_changes(scores(a=[10.0]), scores(a=[40.0]))
    assert found.difference is None and found.n_fell == 1


@pytest.mark.parametrize(
    "floating",
    [
        {},
        scores(a=[1.0], c=[1.0]),
        scores(a=[1.0]),
        scores(a=[1.0, 2.0], b=[1.0]),
        scores(a=[1e300], b=[1.0]),
        scores(a=[None], b=[1.0]),
        scores(a=["x"], b=[1.0]),
        {"per_image": "x"},
        {"per_image": [{}, {}]},
    ],
)
def test_other_prompts_are_not_compared(floating, recwarn):
    assert find_changes(scores(a=[1.0], b=[1.0]), floating) is None
    assert not recwarn.list


def test_the_page_names_them(full_page):
    text = words(full_page)
    paragraph = text[text.index("What fell and what rose") :]
    assert re.search(r"Mean IoU fell by \d\.\d points \. The 95 % interval over 40 images is −\d", paragraph)
    assert "Segm AP fell by 16.5. Box AP fell by 8.6." in paragraph
    assert "The AP rests on 120 objects only" in paragraph
    assert "The mask that fell most is number 1 in 000000000007.jpg: IoU 90.0 → 40.0." in paragraph
    assert "The mask that rose most is number 3 in 000000000007.jpg: IoU 20.0 → 60.5." in paragraph
    assert "noisy: 120 objects" in text


def test_many_objects_are_not_called_noisy(full_folder, tmp_path):
    folder = shutil.copytree(full_folder, tmp_path / "packed")
    results = json.loads((folder / "results.json").read_text())
    results["evaluation"]["n_objects"] = 200
    (folder / "results.json").write_text(json.dumps(results))
    text = words(render(read_source(folder)).html)
    assert "noisy" not in text and "The AP rests on" not in text


def test_an_interval_around_zero_says_that_nothing_is_told_apart(full_folder, tmp_path):
    folder = shutil.copytree(full_folder, tmp_path / "packed")
    results = json.loads((folder / "results.json").read_text())
    for index, image in enumerate(results["float_evaluation"]["per_image"]):
        image["ious"] = [min(100.0, max(0.0, 50 + 10 * (-1) ** index))] * len(image["ious"])
    (folder / "results.json").write_text(json.dumps(results))
    assert "includes 0, so these images do not tell the two models apart" in words(render(read_source(folder)).html)
