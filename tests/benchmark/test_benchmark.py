"""A benchmark of a small random model: every row in a process of its own, against the first."""

import numpy as np
import pytest
from small_models import small_model

from carsam.benchmark.nearest import nearest
from carsam.benchmark.process import SubjectError, SubjectProcess
from carsam.benchmark.processor import processor
from carsam.benchmark.run import Plan, Row, measure
from carsam.benchmark.subjects import BASELINE, Subject, Work, subjects
from carsam.commands.benchmark import _bits_beside_bits, _prompt, _table, _warnings
from carsam.models.forward import encode_image, predict_logits, runs_in

pytest.importorskip("onnxruntime", reason="an optional package: carsam[onnx]")
SIDE = 128


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)


@pytest.fixture(scope="module")
def work(tmp_path_factory, pixels):
    model = small_model("sam")
    folder = tmp_path_factory.mktemp("benchmark")
    model.save_pretrained(folder / "model")
    ours = {"W4A4": nearest(model, "w4a4", [pixels])}
    return Work(str(folder / "model"), model, ours, folder, [pixels], 1)


def crashing(work):
    return work.spec("onnxruntime", encoder="nowhere.onnx", decoder="nowhere.onnx"), 1


def test_rows(work, pixels):
    known = {row.name: row for row in subjects(["W4A4"])}
    rows = [
        known[BASELINE],
        known["ours W4A4, ONNX Runtime"],
        Subject("absent", ("no_such_package",), crashing),
        Subject("broken", (), crashing),
    ]
    said, scored = [], []

    def score(model):
        logits, _ = predict_logits(model, runs_in(model).encode_image(work_pixels), boxes=box)
        scored.append(logits)
        return {"segm_ap": 1.0, "mean_iou": 50.0, "dsc": 60.0}

    import torch

    work_pixels, box = torch.from_numpy(pixels), torch.tensor([[20.0, 20.0, 100.0, 90.0]])
    found = measure(work, rows, pixels, _prompt(work.model), Plan(rounds=2, at_once=1, prompts=1), said.append, score)
    assert [row.name for row in found] == [row.name for row in rows]
    baseline, ours, absent, broken = found
    # Timed in its own two waves, and with the rest of the rows.
    assert len(ours.encoder_ms) == len(ours.decoder_ms) == 2 and len(baseline.encoder_ms) >= 2
    assert ours.file_bytes < 0.3 * baseline.file_bytes
    # Without torch, which alone has more.
    assert 0 < baseline.peak_bytes < 250e6
    assert absent.failed == "not installed: pip install no_such_package"
    assert "nowhere.onnx" in broken.failed
    assert ours.scores["mean_iou"] == 50 and runs_in(work.model) is None
    # What is scored is what runs in the process.
    expected, _ = predict_logits(work.model, encode_image(work.model, work_pixels), boxes=box)
    torch.testing.assert_close(scored[0], expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(scored[0], scored[1], rtol=1e-3, atol=1e-3)
    table = _table("a model", found)
    assert table.row_count == 4
    assert [str(column.header) for column in table.columns[-3:]] == ["AP", "mIoU", "DSC"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PyTorch FP32", "PyTorch bf16 compiled", "ONNX Runtime dynamic INT8 (samexporter)"])
def test_other_hands_compute_the_same_model(work, pixels, name):
    known = {row.name: row for row in subjects([])}
    spec, size = known[name].prepare(work)
    assert size > 0
    if "INT8" in name:
        # Weights are found and quantized: some tools pass over those that are not constants.
        assert size < 0.5 * known[BASELINE].prepare(work)[1]
    with SubjectProcess(spec) as process:
        _, image = process.run("encoder", {"pixel_values": pixels}, keep=True)
        _, found = process.run("decoder", {**image, **_prompt(work.model)}, keep=True)
    import torch

    expected = encode_image(work.model, torch.from_numpy(pixels)).numpy()
    ours = next(iter(image.values()))
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < (1e-4 if name == "PyTorch FP32" else 0.2)
    assert found["logits"].shape[1] == 4


def test_a_subject_that_dies_says_its_last_words():
    with pytest.raises(SubjectError, match="KeyError: 'no such kind'"):
        SubjectProcess({"kind": "no such kind", "threads": 1})


def test_slower_than_float_is_said():
    baseline = Row(BASELINE, encoder_ms=[100.0], baseline_encoder_ms=[100.0])
    slow = Row("ours W8A8, ONNX Runtime", ours=True, encoder_ms=[125.0], baseline_encoder_ms=[100.0])
    (warning, fastest) = _warnings([baseline, slow])
    assert warning.startswith(f"warning: on this machine {slow.name} is slower than ONNX Runtime FP32 (0.80×)")
    assert fastest.startswith("the fastest here is ONNX Runtime FP32 (1.00×)")
    quick = Row("ours W8A8, ONNX Runtime", ours=True, encoder_ms=[50.0], baseline_encoder_ms=[100.0])
    assert _warnings([baseline, quick]) == []


def test_bits_beside_bits_only_in_the_same_rounds():
    def ours(bits, times, baseline):
        return Row(f"ours {bits}, ONNX Runtime", ours=True, encoder_ms=times, baseline_encoder_ms=baseline)

    rounds = [100.0, 110.0, 90.0]
    rows = [
        Row(BASELINE, encoder_ms=rounds, baseline_encoder_ms=rounds),
        ours("W8A8", [50.0, 60.0, 40.0], rounds),
        # Of another wave, against nothing; of the same one, round by round: 1.2, 1.0 and 1.1.
        ours("W6A6", [10.0, 10.0, 10.0], [100.0, 110.0, 91.0]),
        ours("W4A4", [60.0, 60.0, 44.0], rounds),
    ]
    (line,) = _bits_beside_bits(rows)
    assert line.startswith("ours W4A4, ONNX Runtime takes 1.10 of the time of ours W8A8, ONNX Runtime")
    assert line.endswith("(median of 3 rounds; half of them 1.05 to 1.15)")


def test_the_processor_is_named():
    assert "cores" in processor()
