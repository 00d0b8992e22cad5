"""The table of a comparison."""

import json

from carsam.evaluate.intervals import Difference
from carsam.run.comparison_table import ComparisonResult, Measurement, Published, mean_and_spread


def test_the_table_gives_mean_and_half_the_range():
    assert mean_and_spread([1.0]) == "1.0" and mean_and_spread([1.0, 2.0, 4.0]) == "2.3 ± 1.5"
    scores = {"segm_ap": 10.0, "box_ap": 20.0, "mean_iou": 30.0}
    rows = tuple(
        Measurement("rtn", "w4a4", seed, {**scores, "mean_iou": 30.0 + seed}, 6_000_000, 5.0, 1) for seed in (0, 1)
    )
    table = ComparisonResult({**scores, "bytes": 17_000_000}, rows).to_markdown().splitlines()
    assert table[2] == "| float | | 10.0 | 20.0 | 30.0 | 17.0 MB | |"
    assert table[3] == "| W4A4 | rtn | 10.0 ± 0.0 | 20.0 ± 0.0 | 30.5 ± 0.5 | 6.0 MB | 5 s |"
    assert len(table) == 4 and "notes" not in table[0]


def test_the_table_shows_the_difference_to_float():
    scores = {"segm_ap": 10.0, "box_ap": 20.0, "mean_iou": 30.0}
    rows = tuple(Measurement(name, "w4a4", 0, scores, 6_000_000, 5.0, 1) for name in ("a", "b"))
    differences = {("w4a4", "a"): Difference(-4.02, -8.1, 0.9, 10, 72)}
    result = ComparisonResult({**scores, "bytes": 17_000_000}, rows, (), differences, ("A note.",))
    assert result.to_markdown().splitlines() == [
        "| bits | row | segm AP | box AP | mean IoU | to float (95 %) | file | calibration |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| float | | 10.0 | 20.0 | 30.0 | | 17.0 MB | |",
        "| W4A4 | a | 10.0 | 20.0 | 30.0 | -4.0 (-8.1 to +0.9) | 6.0 MB | 5 s |",
        "| W4A4 | b | 10.0 | 20.0 | 30.0 | | 6.0 MB | 5 s |",
        "",
        "A note.",
    ]
    assert result.to_dict()["differences"][0]["mean_iou"]["low"] == -8.1


def test_notes_and_published_numbers_stand_beside_the_measured_ones():
    scores = {"segm_ap": 10.0, "box_ap": 20.0, "mean_iou": 30.0}
    noted = Measurement("b", "w4a4", 0, scores, 6_000_000, 5.0, 1, notes="log2 softmax codes")
    plain = Measurement("a", "w4a4", 0, scores, 6_000_000, 5.0, 1)
    published = (Published("", "float", 55.8, "a paper"), Published("x", "w4a4", 39.3, "a paper"))
    published += (Published("x", "w4a4", 48.5, "a paper", model="SAM-L"),)
    result = ComparisonResult({**scores, "bytes": 17_000_000}, (plain, noted), published)
    assert result.to_markdown().splitlines() == [
        "| bits | row | segm AP | box AP | mean IoU | file | calibration | notes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| float | | 10.0 | 20.0 | 30.0 | 17.0 MB | | |",
        "| W4A4 | a | 10.0 | 20.0 | 30.0 | 6.0 MB | 5 s | |",
        "| W4A4 | b | 10.0 | 20.0 | 30.0 | 6.0 MB | 5 s | log2 softmax codes |",
        "",
        "published, SAM-B",
        "",
        "| bits | row | segm AP | source |",
        "| --- | --- | --- | --- |",
        "| float | | 55.8 | a paper |",
        "| W4A4 | x | 39.3 | a paper |",
        "",
        "published, SAM-L",
        "",
        "| bits | row | segm AP | source |",
        "| --- | --- | --- | --- |",
        "| W4A4 | x | 48.5 | a paper |",
    ]
    assert json.loads(json.dumps(result.to_dict()))["published"][1]["segm_ap"] == 39.3
