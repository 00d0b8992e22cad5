"""benchmarks/evidence.py: plans, splits, rows from quantization to table, workers that fail."""

import json
from dataclasses import replace

import evidence
import evidence_costs
import evidence_inside
import evidence_tables
import evidence_workers
import pytest
from evidence_data import Places, split, subset
from evidence_rows import PLANS, Row, once, read_plan, row_of
from places import ROOT

from carsam.errors import ConfigError, DataError
from carsam.evaluate.scores import dice

PLAN = """
defaults: {subject: embedded, data: embedded, images: 2, boxes: 2, limit: 3, steps: 1}
groups:
  - for: {seed: [0, 1]}
    rows:
      - {label: float, method: float}
      - {label: RTN, method: rtn, set: [weight_observer=min-max, activation_observer=min-max]}
"""


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return str(path)


def made_up(label, ious, seed=0, bits="w4a4", **settings):
    """A row with scores of two images."""
    row = Row(label, "float" if bits == "float" else "rtn", bits=bits, seed=seed, **settings).normalised()
    images = [{"name": f"{i}.png", "ious": each, "source": "CT"} for i, each in enumerate(ious)]
    every = [iou for each in ious for iou in each]
    means = {"mean_iou": sum(every) / len(every), "dsc": sum(map(dice, every)) / len(every), "segm_ap": 10.0 + seed}
    return {
        "row": row.to_dict(),
        "notes": "",
        "scores": {**means, "n_images": 2, "n_prompts": len(every), "per_image": images, "sources": {"CT": means}},
        "seconds": {"all": 1.0, "boxes": 0.5},
        "made": {"commit": "abc", "device": "a GPU", "torch": "2", "transformers": "5"},
    }


def test_a_plan_crosses_its_lists_and_keeps_the_order(plan):
    rows = read_plan(plan)
    # The float model is the same for both seeds; RTN learns nothing, so its steps do not count.
    assert [(row.label, row.seed, row.steps) for row in rows] == [
        ("float", 0, None),
        ("RTN", 0, None),
        ("RTN", 1, None),
    ]
    assert rows[1].settings == {"weight_observer": "min-max", "activation_observer": "min-max"}


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plans_of_the_repository_are_valid_and_their_files_differ(path):
    rows = read_plan(path.stem)
    assert len({row.file_name for row in rows}) == len(rows) > 0
    labelled = {(row.label, row.subject, row.scope, row.data, row.bits, row.seed) for row in rows}
    assert len(labelled) == len(rows)  # a table could not tell them apart


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{label: A, method: rnt}", "unknown method 'rnt'"),
        ("{label: A, method: rtn, stepz: 3}", "unknown setting 'stepz'"),
        ("{label: A, method: rtn, subject: twin}", "unknown subject 'twin'"),
        ("{label: A, method: rtn, bits: float}", "go together"),
        ("{label: A, method: rtn, set: [softmax]}", "write it as key=value"),
        ("{label: A, method: rtn, bits: w1}", "w1"),
        ("{label: A, method: rtn, budget: four}", "cannot read the budget"),
        ("{label: A, method: rtn, budget: 2.5bits}", "nearest budget that can be met is 3bits"),
    ],
)
def test_a_wrong_plan_is_refused_before_anything_runs(tmp_path, change, message):
    path = tmp_path / "plan.yaml"
    path.write_text(f"groups: [{{rows: [{change}]}}]")
    with pytest.raises(ConfigError, match=message):
        read_plan(str(path))


def test_rows_of_several_plans_are_run_once_and_measured_in_every_way():
    rows = [Row("A", "rtn", clicks=(1,)), Row("B", "rtn"), Row("A", "rtn", clicks=(3,), diagnose=4)]
    assert once(rows) == (Row("A", "rtn", clicks=(1, 3), diagnose=4), Row("B", "rtn"))


def test_keys_tell_settings_apart_and_not_what_else_is_measured():
    row = row_of("MAC_0.1=car-sam mac.damping=0.1", {"steps": 30})
    assert (row.label, row.settings, row.steps) == ("MAC 0.1", {"mac": {"damping": 0.1}}, 30)
    assert replace(row, clicks=(1,), diagnose=4).file_name == row.file_name
    assert len({replace(row, **change).key for change in ({}, {"seed": 1}, {"steps": 31}, {"data": "coco"})}) == 4


def test_a_row_under_a_budget_says_so_and_one_without_is_written_as_before():
    plain, mixed = Row("A", "rtn"), Row("A", "rtn", budget="4.0bits")
    assert "budget" not in plain.to_dict() and plain.config().budget is None
    assert Row.from_dict(mixed.to_dict()) == mixed and mixed.key != plain.key
    assert mixed.config().budget == "4.0bits"
    assert mixed.notes == "bits of 3 to 8 under a budget of 4.0bits" and plain.notes == ""


def test_a_split_leaves_no_patient_on_both_sides():
    images = [
        {"file_name": f"{source}{i}.png", "source": source, "group": f"{source}:{i // 3}", "id": f"{source}{i}"}
        for source in ("CT", "MR")
        for i in range(30)
    ]
    calibrate, judge = split(images)
    groups = [{image["group"] for image in images if image["file_name"] in names} for names in (calibrate, judge)]
    assert not groups[0] & groups[1] and len(calibrate | judge) == 60
    assert 28 <= len(calibrate) <= 36  # 32 of 60, up to a patient of 3
    assert all(12 <= sum(name.startswith(source) for name in calibrate) <= 20 for source in ("CT", "MR"))
    annotations = [{"image_id": image["id"]} for image in images]
    part = subset({"images": images, "annotations": annotations}, judge)
    assert len(part["images"]) == len(part["annotations"]) == len(judge)


def test_rows_are_run_kept_and_not_run_again(plan, tmp_path, capsys):
    words = ["run", "--plan", plan, "--results", str(tmp_path / "rows"), "--work", str(tmp_path / "work")]
    packed = ["--pack-rows", str(tmp_path / "rows.jsonl"), "--commit", "abc"]
    assert evidence.main([*words, *packed]) == 0
    assert "3 rows written, 0 failed" in capsys.readouterr().out
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"file": "cut')  # the machine was taken away
    assert evidence.main(["unpack", str(tmp_path / "rows.jsonl"), "--results", str(tmp_path / "rows")]) == 0
    assert "line 4 is left out" in capsys.readouterr().err
    assert evidence.main([*words, "--list"]) == 0
    assert capsys.readouterr().out == "3 rows, 3 of them in rows already\n"

    kept = [json.loads(path.read_text()) for path in sorted((tmp_path / "rows").glob("*.json"))]
    quantized = [each for each in kept if each["row"]["method"] == "rtn"]
    assert len(kept) == 3 and len(quantized) == 2
    for each in quantized:
        scores = each["scores"]
        ious = [iou for image in scores["per_image"] for iou in image["ious"]]
        assert sum(ious) / len(ious) == pytest.approx(scores["mean_iou"], abs=0.01)  # kept with two decimals
        assert scores["dsc"] > scores["mean_iou"]
        assert each["made"]["commit"] == "abc"
    assert evidence.main(["table", "--results", str(tmp_path / "rows"), "--reference", "RTN"]) == 0
    table = capsys.readouterr().out
    assert "| W4A4 | RTN | 2 |" in table and "3 images, 25 boxes" in table


def test_a_row_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    def fails_for_seed_1(bench, row):
        if row.seed == 1:
            raise ValueError("a defect")
        return made_up(row.label, [[50.0], [60.0]], row.seed)

    monkeypatch.setattr(evidence_workers.Bench, "run", fails_for_seed_1)
    sink = evidence_workers.Sink(tmp_path / "rows", None, tmp_path / "failures.jsonl")
    settings = evidence_workers.Settings(Places(), "cpu", None, None)
    rows = [Row("A", "rtn", seed=seed) for seed in range(3)]
    lines = []
    assert evidence_workers.run_rows(rows, settings, sink, workers=1, note=lines.append) == 0
    assert (sink.written, sink.failed) == (2, 1)
    (failure,) = map(json.loads, (tmp_path / "failures.jsonl").read_text().splitlines())
    assert failure["row"]["seed"] == 1 and "ValueError: a defect" in failure["error"]
    assert "FAILED: ValueError: a defect" in lines[1]
    assert evidence_workers.run_rows(rows, settings, sink, workers=1, deadline=-1, note=lines.append) == 3


def test_files_of_packed_rows_stay_small_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence_workers, "MOST_BYTES", 1500)
    sink = evidence_workers.Sink(tmp_path, tmp_path / "rows.jsonl", tmp_path / "failures.jsonl")
    for seed in range(5):
        sink.write(made_up("A", [[50.0], [60.0]], seed))
    files = sorted(tmp_path.glob("rows*.jsonl"))
    assert len(files) > 1 and all(path.stat().st_size <= 1500 for path in files)
    assert sum(len(path.read_text().splitlines()) for path in files) == 5


def results(tmp_path, *found):
    for each in found:
        evidence_workers.write_row(tmp_path / Row.from_dict(each["row"]).file_name, each)
    return evidence_tables.read_results(tmp_path)


def test_tables_average_seeds_and_compare_with_the_reference(tmp_path):
    found = results(
        tmp_path,
        made_up("float", [[80.0, 80.0], [70.0]], bits="float"),
        made_up("CAR-SAM", [[60.0, 60.0], [50.0]]),
        made_up("CAR-SAM", [[62.0, 62.0], [52.0]], seed=1),
        made_up("RTN", [[40.0, 40.0], [30.0]]),
    )
    table = evidence_tables.scores_table(
        evidence_tables.choose(found, {}, {"RTN": "nearest", "CAR-SAM": "both"}), "both"
    )
    lines = table.splitlines()
    assert lines[2].startswith("| float | | | 10.0 | 76.7 | 86.7 |")
    # The one seed that both have: 20 points on every prompt, so without an interval to speak of.
    assert lines[3].endswith("| **-40.0 (-40.0 to -40.0)** | **-20.0 (-20.0 to -20.0)** |")
    assert lines[3].startswith("| W4A4 | nearest | 1 |")
    assert lines[4].startswith("| W4A4 | both | 2 | 10.5 ± 0.5 | 57.7 ± 1.0 |")
    assert "seeds 0, 1" in table and "Commit abc" in table
    by_modality = evidence_tables.modality_table(evidence_tables.choose(found, {}), "CAR-SAM")
    assert "| W4A4 | RTN | 36.7 | 36.7 |" in by_modality
    with pytest.raises(DataError, match="--clicks or --diagnose"):
        evidence_tables.clicks_table(evidence_tables.choose(found, {}), "CAR-SAM")


def test_costs_count_what_another_row_computed_and_shares_of_the_float_model(tmp_path):
    units = [{"unit": "a", "seconds": 20.0}, {"unit": "b", "seconds": 30.0, "from_another_row": True}]
    rows = [made_up("float", [[80.0, 80.0], [80.0]], bits="float")]
    for label, iou in (("A", 60.0), ("B", 64.0)):
        row = made_up(label, [[iou, iou], [iou]])
        row["quantization"] = {"seconds": 25.0, "units": units}
        row["made"] |= {"device": "cpu", "processor": "cpu", "threads": 1}
        rows.append(row)
    found = results(tmp_path, *rows, made_up("without seconds", [[60.0], [50.0]]))
    lines = evidence_costs.costs_table(evidence_tables.choose(found, {}), "A").splitlines()
    assert lines[0].endswith("| IoU to A | seconds | on |")
    assert lines[2] == "| W4A4 | A | 1 | 10.0 | 100.0 % | 60.0 | 75.0 % | | 55 | cpu, 1 threads |"
    assert lines[3].endswith("| 64.0 | 80.0 % | **+4.0 (+4.0 to +4.0)** | 55 | cpu, 1 threads |")
    assert not any("without seconds" in line for line in lines)


def test_a_summary_puts_data_sets_side_by_side(tmp_path):
    found = results(
        tmp_path,
        made_up("float", [[80.0, 80.0], [70.0]], bits="float"),
        made_up("float", [[50.0], [50.0]], bits="float", data="coco"),
        made_up("CAR-SAM", [[60.0, 60.0], [50.0]]),
        made_up("CAR-SAM", [[30.0], [30.0]], data="coco"),
        made_up("RTN", [[40.0, 40.0], [30.0]]),
    )
    lines = evidence_tables.summary_table(evidence_tables.choose(found, {"bits": "w4a4"}), "").splitlines()
    assert lines[2] == "| float | 10.0 | 76.7 | | 10.0 | 50.0 | |"
    row = "| CAR-SAM | 10.0 | 56.7 | **-20.0 (-20.0 to -20.0)** | 10.0 | 30.0 | **-20.0 (-20.0 to -20.0)** |"
    assert lines[3] == row
    assert lines[4] == "", "RTN was not run on both"


def test_seeds_that_were_not_diagnosed_are_left_out_of_that_table(tmp_path):
    course = {"stages": ["a.b.c", "a.b.d"], "errors": [0.5, 0.25], "total_variation": 0.7}
    one = {**made_up("A", [[60.0], [50.0]]), "diagnosis": {"oscillation": course}}
    found = results(tmp_path, one, made_up("A", [[62.0], [52.0]], seed=1), made_up("B", [[62.0], [52.0]]))
    text = evidence_inside.oscillation_table(evidence_tables.choose(found, {}), "")
    assert text.splitlines()[2:4] == ["| W4A4 | A | 0.500 | 0.250 | 0.7 |", ""]
    assert "seeds 0. Commit" in text


def test_what_mac_changed_is_shown_before_and_after(tmp_path):
    change = {"attention": "a.b.c", "scores": [0.04, 0.03], "output": [0.2, 0.1], "change": {"query": 0.5, "key": 0.25}}
    one = made_up("A", [[60.0], [50.0]])
    one["quantization"] = {"compensations": [change]}
    text = evidence_inside.compensation_table(evidence_tables.choose(results(tmp_path, one), {}), "")
    assert "| a.b.c | W4A4 | A | 0.040 → 0.030 | 0.200 → 0.100 | query 0.50, key 0.25 |" in text


def test_a_document_is_filled_below_its_commands(tmp_path):
    results(tmp_path, made_up("A", [[60.0], [50.0]]), made_up("B, C", [[40.0], [30.0]]))
    marked = '# T\n\n<!-- evidence table scores --rows "x=B, C; A" --reference A -->\nstale\n<!-- end -->\n\nAfter.\n'
    text = evidence.filled(marked, tmp_path)
    assert '    python benchmarks/evidence.py table scores --rows "x=B, C; A" --reference A\n\n| bits | row |' in text
    assert "| W4A4 | x | 1 | 10.0 | 35.0 |" in text and text.endswith("<!-- end -->\n\nAfter.\n")
    assert "stale" not in text
    assert evidence.filled(text, tmp_path) == text


@pytest.mark.parametrize("name", ["docs/RESULTS.md", "README.md"])
def test_the_tables_of_documents_are_those_of_the_rows(name):
    text = (ROOT / name).read_text()
    assert evidence.filled(text, evidence.RESULTS) == text, f"run python benchmarks/evidence.py fill {name}"


def test_two_settings_under_one_label_are_refused(tmp_path):
    found = results(tmp_path, made_up("A", [[60.0], [50.0]]), made_up("A", [[60.0], [51.0]], boxes=6))
    with pytest.raises(DataError, match="other settings: boxes"):
        evidence_tables.choose(found, {})
    chosen = evidence_tables.choose(found, {"boxes": 6})
    assert next(iter(chosen.sections.values()))[1][0].values("mean_iou") == [55.5]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"row": {"label": 3}, "scores": {}, "seconds": {}, "made": {}}'])
def test_what_is_no_row_is_told_with_its_name(tmp_path, text, capsys):
    (tmp_path / "x.json").write_text(text)
    assert evidence.main(["table", "--results", str(tmp_path)]) == 1
    assert "x.json" in capsys.readouterr().err


@pytest.mark.slow
def test_workers_share_the_machine_and_outlive_one_another(tmp_path, capsys):
    words = ["run", "--plan", "smoke", "--results", str(tmp_path / "rows"), "--work", str(tmp_path / "work")]
    assert evidence.main([*words, "--workers", "2", "--failures", str(tmp_path / "failures.jsonl")]) == 0
    assert "4 rows written, 0 failed" in capsys.readouterr().out
    for kind in ("scores", "clicks", "units", "time", "dissipation", "oscillation"):
        assert evidence.main(["table", kind, "--results", str(tmp_path / "rows")]) == 0
        assert "CAR-SAM" in capsys.readouterr().out or kind == "clicks"
