"""Prediction on ONNX Runtime: the same masks as in torch, the encoder once and the decoder for every click."""

import copy
import os

import numpy as np
import pytest
import torch
from small_models import SMALL_MODELS, small_model

import carsam
from carsam.errors import ConfigError, DeviceError
from carsam.models.family import family_of
from carsam.models.forward import encode_image, predict_logits, run_in, runs_in
from carsam.runtime.choose import device_for, use_runtime
from carsam.runtime.halves import Halves, prompt_points
from carsam.runtime.onnx import DECODER, KEPT, onnx_halves

pytest.importorskip("onnxruntime", reason="an optional package: carsam[onnx]")

POINTS = torch.tensor([[[30.0, 40.0], [90.0, 20.0]], [[64.0, 64.0], [10.0, 100.0]]])
LABELS = torch.tensor([[1.0, 0.0], [1.0, -1.0]])
BOXES = torch.tensor([[10.0, 20.0, 90.0, 100.0], [40.0, 30.0, 70.0, 120.0]])


def prompts_of(side, mask_side):
    """Every combination that a predictor can give."""
    factor = side / 128
    masks = torch.randn(2, 1, mask_side, mask_side, generator=torch.Generator().manual_seed(0)) * 5
    points, boxes = POINTS * factor, BOXES * factor
    return {
        "points": {"points": points, "labels": LABELS},
        "boxes": {"boxes": boxes},
        "one box of three dimensions": {"boxes": boxes[:1, None]},
        "points and boxes": {"points": points, "labels": LABELS, "boxes": boxes},
        "a mask for all": {"boxes": boxes, "masks": masks[:1]},
        "a mask each": {"boxes": boxes, "masks": masks},
        "masks alone": {"masks": masks},
        "none": {"boxes": boxes[:0]},
    }


@pytest.mark.parametrize("name", sorted(SMALL_MODELS))
def test_every_prompt_gives_the_logits_of_torch(name, tmp_path):
    model = small_model(name)
    family = family_of(model)
    side, mask_side = family.image_size(model), family.low_res_size(model)
    halves = onnx_halves(model, folder=tmp_path / "halves")
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    embedding = encode_image(model, pixels)
    run_in(model, halves)
    elsewhere = encode_image(model, pixels)
    if len(halves.shapes) == 1:
        torch.testing.assert_close(elsewhere, embedding, rtol=1e-4, atol=1e-4)
    for what, prompts in prompts_of(side, mask_side).items():
        for multimask in (False, True):
            run_in(model, None)
            expected = predict_logits(model, embedding, **prompts, multimask_output=multimask)
            run_in(model, halves)
            got = predict_logits(model, elsewhere, **prompts, multimask_output=multimask)
            for ours, theirs in zip(got, expected):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3, msg=f"{what}, {multimask}")
    with pytest.raises(ValueError, match="a box is upside down"):
        predict_logits(model, elsewhere, boxes=BOXES[:, [2, 1, 0, 3]])


def test_points_and_boxes_become_points():
    coordinates, kinds = prompt_points(POINTS, LABELS, None, 1)
    assert coordinates.shape == (2, 3, 2) and kinds[:, 2].tolist() == [-1, -1]
    coordinates, kinds = prompt_points(POINTS, LABELS, BOXES, 1)
    assert kinds.tolist() == [[1, 0, 2, 3], [1, -1, 2, 3]]
    assert coordinates[0, 2:].tolist() == [[10, 20], [90, 100]]
    assert prompt_points(None, None, None, 4)[0].shape == (4, 0, 2)
    assert prompt_points(None, None, BOXES, 1)[1].tolist() == [[2, 3], [2, 3]]
    assert prompt_points(None, None, BOXES, 1, box_ends_in_no_point=True)[1].tolist() == [[2, 3, -1], [2, 3, -1]]


def test_several_tensors_of_an_image_travel_as_one():
    class Split:
        def run(self, inputs):
            return [inputs["pixel_values"][:, :1], inputs["pixel_values"][:, 1:, :2]]

    class Sum:
        def run(self, inputs):
            assert inputs["a"].shape == (1, 1, 4, 4) and inputs["b"].shape == (1, 2, 2, 4)
            total = inputs["a"].sum() + 10 * inputs["b"].sum()
            return [np.full((len(inputs["points"]), 4, 16, 16), total, np.float32), np.zeros((1, 4), np.float32)]

    halves = Halves(Split(), Sum(), {"a": (1, 1, 4, 4), "b": (1, 2, 2, 4)}, 16, "a test")
    pixels = torch.randn(1, 3, 4, 4)
    embedding = halves.encode_image(pixels)
    assert embedding.shape == (1, 32, 1, 1)
    logits, _ = halves.all_masks(embedding, boxes=BOXES)
    total = pixels[:, :1].sum() + 10 * pixels[:, 1:, :2].sum()
    assert logits.shape == (2, 4, 16, 16)
    torch.testing.assert_close(logits[0, 0, 0, 0], total)


def test_a_packed_folder_predicts_in_integers(packed_folder, small_set, cache_folder):
    image = small_set.images[0]
    expected = carsam.load(packed_folder)
    model = carsam.load(packed_folder, runtime="onnx")
    assert runs_in(model).runtime.startswith("onnxruntime ")
    embedding = encode_image(model, image.pixel_values)
    logits = predict_logits(model, embedding, boxes=image.boxes)[0]
    wanted = predict_logits(expected, encode_image(expected, image.pixel_values), boxes=image.boxes)[0]
    inside, theirs = logits > 0, wanted > 0
    iou = (inside & theirs).flatten(1).sum(1) / (inside | theirs).flatten(1).sum(1).clamp(min=1)
    assert iou.min() > 0.95 and iou.mean() > 0.99
    # The files are written once, and a copy of the model runs on the same.
    (files,) = [path for path in (cache_folder / "onnx").iterdir() if (path / DECODER).is_file()]
    written = (files / DECODER).stat().st_mtime_ns
    again = carsam.SamPredictor(packed_folder, runtime="onnx").model
    assert (files / DECODER).stat().st_mtime_ns == written
    assert runs_in(copy.deepcopy(again)) is runs_in(again)
    assert runs_in(carsam.SamPredictor(again).model) is runs_in(again)
    assert runs_in(carsam.SamPredictor(again, runtime="torch").model) is None


def test_only_the_cache_forgets(tmp_path, monkeypatch):
    """Files that were used least recently go, and never those in a folder of the user's."""
    monkeypatch.setenv("CARSAM_CACHE", str(tmp_path / "cache"))
    model = small_model("sam")
    for parent in (tmp_path / "mine", tmp_path / "cache" / "onnx"):
        for number in range(KEPT + 1):
            (parent / str(number)).mkdir(parents=True)
            (parent / str(number) / DECODER).write_bytes(b"")
            os.utime(parent / str(number), (number, number))
    onnx_halves(model, folder=tmp_path / "mine" / "model")
    onnx_halves(model)
    assert len(list((tmp_path / "mine").iterdir())) == KEPT + 2
    left = {path.name for path in (tmp_path / "cache" / "onnx").iterdir()}
    assert len(left) == KEPT and {"0", "1"}.isdisjoint(left)


def test_the_encoder_runs_once_and_the_decoder_for_every_click(packed_folder):
    predictor = carsam.SamPredictor(packed_folder, runtime="onnx")
    halves, calls = runs_in(predictor.model), []

    class Counting:
        def __init__(self, session, name):
            self.session, self.name = session, name

        def run(self, inputs):
            calls.append(self.name)
            return self.session.run(inputs)

    sessions = Counting(halves.encoder, "encoder"), Counting(halves.decoder, "decoder")
    run_in(predictor.model, Halves(*sessions, halves.shapes, halves.mask_side, halves.runtime))
    predictor.set_image(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    for x in (20, 40, 60):
        masks, scores, low_res = predictor.predict(np.array([[x, 30]]), np.array([1]))
        assert masks.shape == (3, 60, 90) and scores.shape == (3,)
        predictor.predict(np.array([[x, 30]]), np.array([1]), mask_input=low_res[:1], multimask_output=False)
    assert calls == ["encoder", *["decoder"] * 6]


def test_wrong_runtimes_and_devices():
    with pytest.raises(ConfigError, match="unknown runtime 'tpu'; choose from torch, onnx, cuda"):
        device_for("tpu", "cpu")
    with pytest.raises(DeviceError):
        device_for("onnx", "cuda:7")
    assert device_for("onnx", "auto").type == "cpu"
    with pytest.raises(ConfigError, match="unknown runtime"):
        use_runtime(small_model("sam"), "openvino2")


def test_without_onnx_runtime_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"onnxruntime is not installed .*carsam\[onnx\]"):
        use_runtime(small_model("sam"), "onnx")
