"""A package from outside brings a family: found, quantized, packed, loaded, measured, diagnosed, reported.

Each in a Python of its own: what a plugin defines cannot be taken back from a running one.
"""

import json
import shutil
import textwrap

import pytest
from outside_package import HERE, ROOT, announce, python
from PIL import Image

from carsam.models.family import families
from carsam.models.names import names_of_type


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder that, on ``sys.path``, brings the package of ``outside_family.py``."""
    folder = announce(tmp_path_factory.mktemp("site"), "toy-family", "toy_family")
    shutil.copy(HERE / "outside_family.py", folder / "toy_family.py")
    return folder


@pytest.fixture(scope="module")
def story(outside, calibration_folder, evaluation_folder, tmp_path_factory):
    """A folder with the float model (``float``), what the commands made of it (``packed``), and what they printed."""
    folder = tmp_path_factory.mktemp("toy")
    code = """
    import json
    import sys
    from contextlib import redirect_stdout

    folder, *commands = sys.argv[1:]
    from carsam.models.family import families
    assert "toy" in families()
    from toy_family import ToySamModel, small_model
    small_model().save_pretrained(f"{folder}/float")

    import carsam
    from carsam.cli import app

    for command in commands:
        name, *arguments = json.loads(command)
        with open(f"{folder}/{name}.txt", "w") as file, redirect_stdout(file):
            app([name, *arguments], standalone_mode=False)
    model = carsam.load(f"{folder}/packed")
    assert type(model) is ToySamModel
    from transformers import AutoModel
    assert type(AutoModel.from_pretrained(f"{folder}/packed")) is ToySamModel
    """
    data = ["--data", calibration_folder / "images", "--data-coco", calibration_folder / "instances.json"]
    measured = ["--images", evaluation_folder / "images", "--coco", evaluation_folder / "instances.json"]
    few = ["--n-images", 2, "--boxes-per-image", 2, "--steps", 2, "--set", "weight_observer=min-max"]
    photo = min((calibration_folder / "images").glob("*.jpg"))
    packed = folder / "packed"
    commands = [
        ["quantize", folder / "float", *data, *few, "--method", "car-sam", "--out", packed],
        ["info", packed, "--json", folder / "info.json"],
        ["evaluate", packed, *measured, "--limit", 1, "--points"],
        ["predict", packed, photo, "--box", "10,10,60,50", "--out", folder / "masks"],
        ["diagnose", folder / "float", packed, *measured, "--limit", 1, "--boxes-per-image", 1],
        ["report", packed, "--out", folder / "report.html"],
    ]
    said = [json.dumps([str(part) for part in command]) for command in commands]
    python("-c", textwrap.dedent(code), folder, *said, path=[outside])
    return folder


def test_nothing_of_it_is_known_here():
    assert "toy" not in families() and names_of_type("toy_sam").family == ""


def test_info_names_its_regions(story):
    values = json.loads((story / "info.json").read_text())
    assert values["family"] == "toy"
    layers = {region["region"]: region["layers"] for region in values["regions"]}
    assert layers == {"toy blocks": 3, "encoder neck": 2, "decoder transformer": 32, "everything else": 0}


def test_it_is_measured_and_predicts(story):
    scores = json.loads((story / "packed" / "results.json").read_text())["evaluation"]
    assert scores["n_images"] == 1 and 0 <= scores["mean_iou"] <= 100 and "points" in scores
    (mask,) = (story / "masks").rglob("*_mask*.png")
    with Image.open(mask) as image:
        assert min(image.size) > 100


def test_diagnosis_and_report_speak_its_words(story):
    diagnosis = json.loads((story / "packed" / "diagnosis" / "diagnosis.json").read_text())
    assert {each["stage"] for each in diagnosis["attentions"]} == {"decoder"}
    assert "vision_encoder.layers.2.mixing" in {each["site"] for each in diagnosis["sensitivity"]}
    page = (story / "report.html").read_text()
    assert "Toy SAM, quantized with" in page and "toy blocks" in page
    assert "other quantized layers" not in page and "encoder blocks" not in page


def test_its_card_says_what_loads_it(story):
    card = (story / "packed" / "README.md").read_text()
    assert "library_name: toy_family" in card and "`ToySamModel`,\na class of toy_family" in card


def test_without_the_package_it_is_refused_and_still_reported(story, tmp_path):
    _, message = python("-m", "carsam", "info", story / "packed", code=1)
    assert "toy_sam" in message and "Traceback" not in message
    python("-m", "carsam", "report", story / "packed", "--out", tmp_path / "report.html")
    assert "vision_encoder" in (tmp_path / "report.html").read_text()


def test_a_change_of_its_code_makes_finished_units_stale(outside, tmp_path):
    code = """
    import sys
    from pathlib import Path

    from carsam.run.store import code_fingerprint

    before = code_fingerprint()
    source = Path(sys.argv[1], "toy_family.py")
    source.write_text(source.read_text() + "# another line")
    code_fingerprint.cache_clear()
    assert code_fingerprint() != before
    """
    folder = shutil.copytree(outside, tmp_path / "site")
    python("-c", textwrap.dedent(code), folder, path=[folder])


def test_the_contract_of_families_holds_it_too(outside):
    tests = ROOT / "tests" / "models" / "test_family_contract.py"
    options = ["-vv", "-p", "no:cacheprovider", "-k", "toy and not ahc and not ptq4sam and not adaround and not brecq"]
    output, _ = python("-m", "pytest", tests, *options, path=[outside])
    passed = {line.partition(" ")[0].partition("::")[2] for line in output.splitlines() if " PASSED" in line}
    assert {
        "test_it_is_told_apart_and_described[toy]",
        "test_stages_in_order_are_the_model[toy-decoder]",
        "test_units_cover_every_site_once_and_run_as_their_stage_does[toy-pair]",
        "test_every_method_quantizes_it_and_the_folder_comes_back_equal[toy-car-sam]",
    } <= passed
