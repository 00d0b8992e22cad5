"""A packed SAM 2 goes through every command for images, the report, and transformers."""

import json
import shutil

import pytest
import torch
from PIL import Image
from places import CALIBRATION_COCO, CALIBRATION_IMAGES, EVALUATION_COCO, EVALUATION_IMAGES
from small_models import small_model
from transformers import AutoModel, Sam2ImageProcessor, Sam2Model
from typer.testing import CliRunner

import carsam
from carsam.cli import app
from carsam.data.images.transforms import preprocessor_config
from carsam.errors import CheckpointError
from carsam.models.family import find_sites
from carsam.models.forward import encode_image, predict_logits
from carsam.models.load import load_model
from carsam.predict.automatic_masks import SamAutomaticMaskGenerator
from carsam.report.page import render
from carsam.report.source import read_source


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The float model as transformers saves it, and the packed one, evaluated and diagnosed; what diagnosis said."""
    place = tmp_path_factory.mktemp("sam2")
    model = small_model("sam2")
    model.save_pretrained(place / "sam2-small")
    (place / "sam2-small" / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(model)))
    packed = place / "sam2-small-w4a4"
    data = ("--data", CALIBRATION_IMAGES, "--data-coco", CALIBRATION_COCO, "--n-images", 2, "--boxes-per-image", 2)
    quick = ("--set", "weight_observer=min-max", "--set", "activation_observer=min-max")
    run("quantize", place / "sam2-small", *data, *quick, "--method", "rtn", "--out", packed, "--device", "cpu")
    measured = ("--images", EVALUATION_IMAGES, "--coco", EVALUATION_COCO, "--device", "cpu", "--limit", 1)
    run("evaluate", packed, *measured, "--points")
    said = run("diagnose", place / "sam2-small", packed, *measured, "--boxes-per-image", 2, "--no-sensitivity")
    return place / "sam2-small", packed, said


def test_scores(folders):
    scores = json.loads((folders[1] / "results.json").read_text())["evaluation"]
    assert scores["n_images"] == 1 and 0 <= scores["mean_iou"] <= 100
    assert set(scores["points"]["mean_iou"]) >= {"1", "3", "5"}


def test_info(folders, tmp_path):
    run("info", folders[1], "--json", tmp_path / "packed.json")
    values = json.loads((tmp_path / "packed.json").read_text())
    sites = find_sites(load_model(folders[0]))
    inside = [site.name for site in sites.layers if not sites.in_decoder(site.name)]
    regions = {region["region"]: region for region in values["regions"]}
    assert list(regions) == ["encoder blocks", "encoder neck", "decoder transformer", "everything else"]
    assert regions["encoder neck"]["layers"] == 4 and regions["encoder blocks"]["layers"] == len(inside) - 4
    assert regions["encoder blocks"]["bits"] == {"w4a4": len(inside) - 4}
    assert values["family"] == "sam2" and values["input_pixels"] == 128
    assert "SAM 2 in floating point" in run("info", folders[0]).stdout


def test_diagnosis_and_report(folders):
    _, packed, said = folders
    values = json.loads((packed / "diagnosis" / "diagnosis.json").read_text())
    sites = find_sites(carsam.load(packed))
    assert [each["name"] for each in values["attentions"]] == [site.name for site in sites.attentions]
    assert len(values["oscillation"]["stages"]) == len(sites.moments)
    # Windows of 8, 8, 4 and 6 cells, and a block that sees all of its 8 × 8.
    encoder = [each["keys"] for each in values["attentions"] if each["stage"] == "encoder"]
    assert encoder == [64, 64, 16, 64, 36]
    assert "vision_encoder" not in said.stdout
    page = render(read_source(packed))
    assert page.refused == {}
    for text in ("encoder blocks", "encoder neck", "block 0", "0 tok→img", "SAM 2, quantized with"):
        assert text in page.html, text
    assert "other quantized layers" not in page.html


def test_predict(folders, tmp_path):
    photo = EVALUATION_IMAGES / "000000000885.jpg"
    with Image.open(photo) as image:
        size = image.size
    for name, flags in {"boxes": ("--box", "10,20,200,220"), "points": ("--point", "100,100")}.items():
        run("predict", folders[1], photo, *flags, "--out", tmp_path / name, "--device", "cpu")
        (overlay,) = (tmp_path / name).rglob("*_overlay.png")
        assert Image.open(overlay).size == size
    image = carsam.read_image(photo)
    settings = {"points_per_side": 2, "pred_iou_thresh": -100.0, "stability_score_thresh": 0.0}
    masks = SamAutomaticMaskGenerator(carsam.load(folders[1]), **settings).generate(image)
    assert masks and all(mask["segmentation"].shape == image.shape[:2] for mask in masks)


@torch.no_grad()
def test_transformers_loads_it(folders, tmp_path):
    packed = carsam.load(folders[1])
    pixels, boxes = torch.randn(1, 3, 128, 128), torch.tensor([[10.0, 20.0, 90.0, 100.0]])
    expected = predict_logits(packed, encode_image(packed, pixels), boxes=boxes)[0]
    for kind in (AutoModel, Sam2Model):
        again = kind.from_pretrained(folders[1])
        assert type(again) is Sam2Model
        found = predict_logits(again, encode_image(again, pixels), boxes=boxes)[0]
        assert torch.equal(found, expected)
    assert all(not buffer.is_meta for buffer in again.buffers())
    again.save_pretrained(tmp_path / "again")
    first, second = (folder / "model.safetensors" for folder in (folders[1], tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()
    try:
        processor = Sam2ImageProcessor.from_pretrained(folders[1])
    except ImportError:
        return  # transformers' processor needs torchvision
    assert dict(processor.size) == {"height": 128, "width": 128}


def test_a_changed_number_of_blocks_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders[1], tmp_path / "changed")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["backbone_config"]["blocks_per_stage"] = [1, 1, 10**6, 1]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        carsam.load(folder)
    with pytest.raises(CheckpointError, match="blocks_per_stage"):
        Sam2Model.from_pretrained(folder)


def test_model_card(folders):
    text = (folders[1] / "README.md").read_text()
    assert 'Sam2Model.from_pretrained("sam2-small-w4a4")' in text and "SamModel." not in text
