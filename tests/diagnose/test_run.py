"""Whole diagnoses: the contract of ``diagnosis.json``, methods with other grids, models that do not belong together."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import carsam
from carsam.config import CalibrationConfig, QuantizeConfig
from carsam.diagnose.folder import FILE, check_target, write_folder
from carsam.diagnose.pair import open_pair
from carsam.diagnose.results import plain
from carsam.diagnose.run import diagnose, reconstruction_units
from carsam.errors import CarsamError, CheckpointError
from carsam.evaluate.coco_metrics import evaluate_coco

SETTINGS = {"weight_observer": "min-max", "activation_observer": "min-max"}
LEARNED = {"reconstruction": {"steps": 1, "decoder_steps": 1}}


@pytest.fixture(scope="session")
def diagnosed(nano_folder, packed_folder, evaluation_folder, tmp_path_factory):
    """A diagnosis of CAR-SAM without sensitivity, and its folder."""
    out = tmp_path_factory.mktemp("diagnosed") / "diagnosis"
    return diagnose(
        nano_folder,
        packed_folder,
        evaluation_folder / "images",
        coco=evaluation_folder / "instances.json",
        limit=2,
        prompts=100,
        out=out,
        with_sensitivity=False,
    )


def test_scores_are_those_of_the_evaluation(diagnosed, nano, packed_folder, evaluation_folder):
    found, _ = diagnosed
    assert found.reference == "ground truth"
    for model, mean in ((nano, found.mean_iou_float), (carsam.load(packed_folder), found.mean_iou_quantized)):
        scores = evaluate_coco(model, evaluation_folder / "instances.json", evaluation_folder / "images", limit=2)
        assert 100 * mean == pytest.approx(scores.mean_iou, abs=0.5)


def test_the_file(diagnosed):
    found, folder = diagnosed
    values = json.loads((folder / FILE).read_text())
    assert values["format"] == 1
    assert (values["method"], values["bits"], values["n_images"]) == ("car-sam", "w4a4", 2)
    assert values["n_prompts"] == len(found.examples[0].prompts) + len(found.examples[1].prompts)
    assert [len(values[key]) for key in ("attentions", "heat_maps", "sites", "weights", "sensitivity", "examples")] == [
        *(15, 6, 126, 66, 0, 2),
    ]
    keys = {"entropy_float", "entropy_quantized", "entropy_change", "kl", "focus_overlap"}
    for attention in values["attentions"]:
        assert keys | {"name", "stage", "queries", "keys", "heads"} <= set(attention)
        assert all(keys <= set(head) for head in attention["heads"])
    assert [values["attentions"][index]["queries"] for index in (0, 1, 8, 10)] == [49, 256, 7, 256]
    assert set(values["oscillation"]) == {"stages", "moments", "errors", "total_variation", "neighbours"}


def test_pictures_are_there_and_small(diagnosed):
    found, folder = diagnosed
    named = [name for each in found.heat_maps for name in (each.float_, each.quantized)]
    named += [name for each in found.examples for name in (each.float_, each.quantized, each.truth)]
    assert len(set(named)) == len(named) == 18
    zooms = [zoom for each in found.examples for zoom in each.zooms]
    assert 0 < len(zooms) <= 6
    named += [name for zoom in zooms for name in (zoom.float_, zoom.quantized, zoom.truth)]
    assert sorted(named) == sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != FILE
    )
    for name in named:
        assert (folder / name).stat().st_size < 150_000
        with Image.open(folder / name) as picture:
            assert max(picture.size) <= 512


def test_examples_and_heat_maps(diagnosed):
    found, _ = diagnosed
    worst, median = found.examples
    assert (worst.role, median.role) == ("worst", "median")
    losses = [each.mean_iou_float - each.mean_iou_quantized for each in found.examples]
    assert losses[0] >= losses[1]
    for example, maps in ((worst, found.heat_maps[:3]), (median, found.heat_maps[3:])):
        assert np.mean([p.iou_quantized for p in example.prompts]) == pytest.approx(example.mean_iou_quantized)
        assert {each.image for each in maps} == {example.image}
        assert {each.box for each in maps} == {example.prompts[0].box}
    assert [each.attention.rpartition("transformer.")[2] for each in found.heat_maps[:3]] == [
        *("layers.0.cross_attn_token_to_image", "layers.1.cross_attn_token_to_image", "final_attn_token_to_image"),
    ]


@pytest.mark.parametrize(
    ("method", "settings", "grids", "moments"),
    [
        ("rtn", {"softmax": "row-max"}, {"uniform", "row-max"}, 1),
        ("ptq4sam-l", LEARNED, {"uniform", "log2"}, 11),
        ("ahcptq", LEARNED, {"uniform", "grouped", "log-uniform", "log2"}, 11),
    ],
)
def test_methods(method, settings, grids, moments, nano_folder, calibration_folder, tmp_path):
    """Other grids, transforms and units; into the packed folder."""
    images, coco = calibration_folder / "images", calibration_folder / "instances.json"
    data = CalibrationConfig(images=str(images), coco=str(coco), n_images=1, boxes_per_image=1)
    config = QuantizeConfig(method=method, settings={**SETTINGS, **settings}, calibration=data)
    packed = tmp_path / "packed"
    carsam.quantize(nano_folder, images, config, out=packed)
    found, folder = diagnose(nano_folder, packed, images, coco=coco, limit=1, prompts=1, with_sensitivity=False)
    assert folder == packed / "diagnosis"
    assert (folder / FILE).is_file()
    assert [each.role for each in found.examples] == ["worst"]
    assert {each.grid for each in found.sites} == grids
    assert len(found.oscillation.moments) == moments
    assert found.oscillation.moments[-1].errors == pytest.approx(found.oscillation.errors, rel=0.05)
    assert len(found.oscillation.neighbours) == (6 if moments > 1 else 0)
    for each in found.sites:
        if each.grid in ("row-max", "log2"):
            assert each.clipped < 0.01
    if method in ("ptq4sam-l", "ahcptq"):
        assert all(each.error < 0.1 for each in found.weights)  # BIG's flips do not count
    carsam.load(packed)  # the folder is still whole


def test_reconstruction_units_are_copied(tmp_path):
    unit = {"unit": "a", "steps": 2, "losses": [[0, 1.5]], "before": [0.1], "after": [0.05], "seconds": 1.0}
    assert reconstruction_units(tmp_path) == ()
    for text in ("{", "[]", json.dumps({"quantization": {"units": [{"unit": "a"}]}})):
        (tmp_path / "results.json").write_text(text)
        assert reconstruction_units(tmp_path) == ()
    (tmp_path / "results.json").write_text(json.dumps({"quantization": {"units": [{**unit, "more": 1}]}}))
    assert reconstruction_units(tmp_path) == (unit,)


def test_plain():
    assert plain({"a": (1.23456789, float("nan"), float("inf"), -0.0, True, None, 3)}) == {
        "a": [1.23457, None, None, 0.0, True, None, 3]
    }


def test_a_model_of_another_architecture(nano, packed_folder, tmp_path):
    config = type(nano.config).from_dict(nano.config.to_dict())
    config.vision_config.num_hidden_layers = 6
    config.vision_config.global_attn_indexes = [1, 3]
    torch.manual_seed(0)
    type(nano)(config).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="different architecture"):
        open_pair(tmp_path / "other", packed_folder, "cpu")


def test_another_model_of_the_same_architecture(fresh_nano, packed_folder, tmp_path):
    fresh_nano.mask_decoder.mask_tokens.weight.data.mul_(-1)
    fresh_nano.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="was not made from"):
        open_pair(tmp_path / "other", packed_folder, "cpu")


def test_models_in_the_wrong_places(nano_folder, packed_folder, tmp_path):
    with pytest.raises(CheckpointError, match="already quantized"):
        open_pair(packed_folder, packed_folder, "cpu")
    for wrong in (nano_folder, tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="not a packed carsam model"):
            open_pair(nano_folder, wrong, "cpu")


def test_an_earlier_diagnosis_is_replaced_at_once_or_not_at_all(diagnosed, tmp_path, monkeypatch):
    found, _ = diagnosed
    target = tmp_path / "diagnosis"
    pictures = {"heat/a.jpg": Image.new("RGB", (8, 8))}
    write_folder(target, found, pictures, 80)
    write_folder(target, found, {"heat/b.jpg": pictures["heat/a.jpg"]}, 80)
    assert [path.name for path in (target / "heat").iterdir()] == ["b.jpg"]

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    for name in ("PIL.Image.Image.save", "carsam.output.target.os.replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(name, interrupted)
            write_folder(target, found, pictures, 80)
        assert [path.name for path in (target / "heat").iterdir()] == ["b.jpg"]
        assert [path.name for path in tmp_path.iterdir()] == ["diagnosis"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    for target in (tmp_path, tmp_path / "photo.jpg"):
        with pytest.raises(CarsamError, match="is not a diagnosis"):
            check_target(target)
    with pytest.raises(CarsamError, match="not a writable folder"):
        check_target(tmp_path / "photo.jpg" / "below")
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty")
    check_target(tmp_path / "new" / "folder")


def test_no_paths_of_this_machine(diagnosed):
    """Only the models' names, as given."""
    _, folder = diagnosed
    values = json.loads((folder / FILE).read_text())
    del values["float"], values["quantized"]
    assert not re.search(r'"/', json.dumps(values))
