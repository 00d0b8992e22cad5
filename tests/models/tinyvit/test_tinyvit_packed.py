"""A packed TinyViT SAM goes everywhere that a packed SAM goes: commands, report, diagnosis, prediction, the Hub."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

import carsam
from carsam.cli import app
from carsam.models.family import find_sites
from carsam.models.tinyvit.modeling import TinyVitSamModel
from carsam.predict.automatic_masks import SamAutomaticMaskGenerator
from carsam.report.page import render
from carsam.report.source import read_source

QUICK = {
    "reconstruction": {"steps": 2, "decoder_steps": 2},
    "weight_observer": "min-max",
    "activation_observer": "min-max",
}


@pytest.fixture(scope="module")
def run():
    def call(*arguments, code=0):
        result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result

    return call


@pytest.fixture(scope="module")
def packed(tinyvit_packed_folder):
    return carsam.load(tinyvit_packed_folder)


@pytest.fixture(scope="module")
def photo(evaluation_folder):
    return evaluation_folder / "images" / "000000000885.jpg"


def test_info(run, tinyvit_folder, tinyvit_packed_folder, tmp_path):
    result = run("info", tinyvit_packed_folder, "--json", tmp_path / "packed.json")
    assert "rtn at w4a4" in result.stdout
    values = json.loads((tmp_path / "packed.json").read_text())
    sites = find_sites(carsam.load_model(tinyvit_folder))
    regions = {region["region"]: region for region in values["regions"]}
    assert list(regions) == ["encoder stages", "encoder neck", "decoder transformer", "everything else"]
    inside = [site.name for site in sites.layers if not sites.in_decoder(site.name)]
    assert regions["encoder neck"]["layers"] == 2
    assert regions["encoder stages"]["layers"] == len(inside) - 2
    assert regions["decoder transformer"]["layers"] == len(sites.layers) - len(inside)
    assert regions["encoder stages"]["bits"] == {"w4a4": len(inside) - 2}
    assert values["family"] == "tinyvit" and values["input_pixels"] == 128

    floating = run("info", tinyvit_folder, "--json", tmp_path / "float.json")
    assert "TinyViT SAM in floating point" in floating.stdout
    other = json.loads((tmp_path / "float.json").read_text())
    assert [region["weights"] for region in other["regions"]] == [region["weights"] for region in values["regions"]]
    assert other["float16_bytes"] == values["float16_bytes"] > 2 * values["bytes"]


@pytest.fixture(scope="module")
def diagnosed(run, tinyvit_folder, tinyvit_packed_folder, evaluation_folder, tmp_path_factory):
    """A copy of the packed folder that was evaluated and diagnosed, and what the commands said."""
    folder = shutil.copytree(tinyvit_packed_folder, tmp_path_factory.mktemp("tinyvit") / "mobilesam-w4a4")
    data = ("--images", evaluation_folder / "images", "--coco", evaluation_folder / "instances.json", "--device", "cpu")
    evaluated = run("evaluate", folder, *data, "--limit", 2, "--points")
    said = run("diagnose", tinyvit_folder, folder, *data, "--limit", 1, "--boxes-per-image", 2)
    return folder, evaluated, said


def test_evaluation_with_boxes_and_clicks(diagnosed):
    folder, result, _ = diagnosed
    assert "mean IoU" in result.stdout
    scores = json.loads((folder / "results.json").read_text())["evaluation"]
    assert scores["n_images"] == 2 and 0 <= scores["mean_iou"] <= 100
    assert set(scores["points"]["mean_iou"]) >= {"1", "3", "5"}


def test_diagnosis(diagnosed, packed):
    folder, _, said = diagnosed
    values = json.loads((folder / "diagnosis" / "diagnosis.json").read_text())
    sites = find_sites(packed)
    assert [each["name"] for each in values["attentions"]] == [site.name for site in sites.attentions]
    for each in values["attentions"]:
        assert 0 <= each["kl"] < 20 and 0 <= each["focus_overlap"] <= 1
    # Windows of 7, 5 and 3 cells: a query sees its window, padded cells too, but only cells of the image are counted.
    encoder = [each for each in values["attentions"] if each["stage"] == "encoder"]
    assert [each["keys"] for each in encoder] == [49, 25, 25, 9]
    assert len(values["oscillation"]["stages"]) == len(sites.moments)
    assert [each["site"] for each in values["weights"]] == [site.name for site in sites.layers]
    assert {each["site"] for each in values["sites"]} == set(sites.activation_names)
    assert len(values["sensitivity"]) == len(sites.names)
    assert max(each["error"] for each in values["sensitivity"]) < 10
    most = max(values["sensitivity"], key=lambda each: each["error"])["site"]
    assert most.replace("vision_encoder.", "encoder.").replace("mask_decoder.transformer.", "decoder.") in said.stdout
    assert "vision_encoder" not in said.stdout and "mask_decoder" not in said.stdout


def test_report(diagnosed):
    folder, _, _ = diagnosed
    page = render(read_source(folder))
    # The method reconstructs nothing; everything else is known.
    assert page.missing == () and page.refused == {}
    for text in (
        "encoder stages",
        "encoder neck",
        "layer 0",
        "local_conv",
        "0 tok→img",
        "conv",
        "TinyViT SAM, quantized with",
    ):
        assert text in page.html, text
    assert "block 0" not in page.html and "other quantized layers" not in page.html


def test_predict(run, tinyvit_packed_folder, photo, tmp_path):
    with Image.open(photo) as image:
        size = image.size
    prompts = {
        "boxes": ("--box", "10,20,200,220", "--box", "50,60,300,300"),
        "points": ("--point", "100,100", "--point", "20,30,0"),
        "everything": ("--everything",),
    }
    for name, flags in prompts.items():
        run("predict", tinyvit_packed_folder, photo, *flags, "--out", tmp_path / name, "--device", "cpu")
        (overlay,) = (tmp_path / name).rglob("*_overlay.png")
        assert Image.open(overlay).size == size
    masks = sorted((tmp_path / "boxes").rglob("*_mask_*.png"))
    assert [Image.open(mask).size for mask in masks] == [size, size]


def test_every_mask_and_segment_anythings_interface(packed, photo):
    image = carsam.read_image(photo)
    generator = SamAutomaticMaskGenerator(packed, points_per_side=2, pred_iou_thresh=-100.0, stability_score_thresh=0.0)
    masks = generator.generate(image)
    assert all(mask["segmentation"].shape == image.shape[:2] for mask in masks)
    sam = carsam.as_segment_anything(packed)
    assert sam.sam_model is packed and sam.image_encoder.img_size == 128
    pixels = sam.preprocess(torch.zeros(3, 128, 100))[None]
    assert sam.image_encoder(pixels).shape == (1, 256, 8, 8)


def test_compare(run, tinyvit_folder, calibration_folder, evaluation_folder, tmp_path):
    recipe = tmp_path / "rows.yaml"
    rows = [{"name": "nearest", "method": "rtn"}, {"name": "pairs", "method": "car-sam", "settings": QUICK}]
    recipe.write_text(yaml.safe_dump({"calibration": {"n_images": 2, "boxes_per_image": 2}, "rows": rows}))
    calibration = ("--data", calibration_folder / "images", "--data-coco", calibration_folder / "instances.json")
    measured = ("--images", evaluation_folder / "images", "--coco", evaluation_folder / "instances.json")
    where = ("--out", tmp_path / "out", "--device", "cpu", "--json", tmp_path / "rows.json")
    run("compare", "--recipe", recipe, "--model", tinyvit_folder, *calibration, *measured, *where)
    measurements = json.loads((tmp_path / "rows.json").read_text())["measurements"]
    assert {each["row"] for each in measurements} == {"nearest", "pairs"}
    assert all(0 <= each["scores"]["mean_iou"] <= 100 for each in measurements)


@torch.no_grad()
def test_save_pretrained_and_back(packed, tinyvit_packed_folder, tmp_path):
    packed.save_pretrained(tmp_path / "again")
    again = TinyVitSamModel.from_pretrained(tmp_path / "again")
    inputs = {"pixel_values": torch.randn(1, 3, 128, 128), "input_boxes": torch.tensor([[[10.0, 20.0, 90.0, 100.0]]])}
    assert torch.equal(packed(**inputs).pred_masks, again(**inputs).pred_masks)
    first, second = (folder / "model.safetensors" for folder in (tinyvit_packed_folder, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


def test_the_pipeline_for_masks_runs_it(tinyvit_packed_folder, photo):
    from transformers import pipeline

    generator = pipeline("mask-generation", model=str(tinyvit_packed_folder))
    assert isinstance(generator.model, TinyVitSamModel)


def test_model_card_and_push(run, tinyvit_packed_folder, monkeypatch):
    text = (tinyvit_packed_folder / "README.md").read_text()
    assert 'carsam.load("mobilesam-small-w4a4")' in text
    assert 'AutoModel.from_pretrained("mobilesam-small-w4a4")` works too' in text and "`TinyVitSamModel`" in text
    assert "`SamModel" not in text
    assert ModelCard(text).data.library_name == "carsam"
    sent = {}

    def create_repo(_api, repo_id, **_options):
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(_api, repo_id, folder_path, **_options):
        sent[repo_id] = (Path(folder_path) / "README.md").read_text()

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    run("push", tinyvit_packed_folder, "someone/mobile")
    assert 'carsam.load("someone/mobile")' in sent["someone/mobile"]
    assert 'AutoModel.from_pretrained("someone/mobile")' in sent["someone/mobile"]
