"""A package from outside brings grids and a method: found, run, packed, loaded, and held to the contracts.

Each in a Python of its own: what a plugin defines cannot be taken back from a running one.
"""

import json
import shutil
import textwrap

import pytest
from outside_package import HERE, ROOT, announce, python
from PIL import Image
from safetensors import safe_open

from carsam.methods.base import registry
from carsam.quantizers import softmax_grids


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder that, on ``sys.path``, brings the package of ``outside.py``."""
    folder = announce(tmp_path_factory.mktemp("site"), "toy-grids", "toy_grids")
    shutil.copy(HERE / "outside.py", folder / "toy_grids.py")
    return folder


def test_it_is_listed_and_its_grid_of_p_serves_any_method(outside):
    code = """
    from typer.testing import CliRunner

    from carsam.cli import app
    from carsam.methods.base import create
    from carsam.quantizers import activation_grids, softmax_grids

    run = CliRunner().invoke
    (row,) = [line for line in run(app, ["methods"]).stdout.splitlines() if " toy " in line]
    assert "a method from outside" in row and "P in square-root codes; second layers shifted" in row, row
    settings = run(app, ["methods", "toy"]).stdout
    assert "widened" in settings and "reconstruction.steps" in settings, settings
    assert "toy-shifted" in activation_grids() and "toy-root" in softmax_grids()
    rtn = create("rtn", {"softmax": "toy-root"})
    assert isinstance(rtn.softmax_for("x.probs", 4), softmax_grids()["toy-root"])
    assert rtn.notes == "P in square-root codes"
    """
    python("-c", textwrap.dedent(code), path=[outside])
    assert "toy" not in registry() and "toy-root" not in softmax_grids()


@pytest.fixture(scope="module")
def packed(outside, nano_folder, calibration_folder, tmp_path_factory):
    """What ``carsam quantize --method toy`` wrote (``packed``), its masks, and what its model saved (``again``)."""
    folder = tmp_path_factory.mktemp("toy")
    code = """
    import sys

    import torch
    from transformers import SamModel

    import carsam
    from carsam.cli import app

    folder, photo, *arguments = sys.argv[1:]
    app(arguments, standalone_mode=False)
    predict = ["predict", f"{folder}/packed", photo, "--box", "10,10,60,50", "--out", f"{folder}/masks"]
    app(predict, standalone_mode=False)
    model = carsam.load(f"{folder}/packed")
    model.save_pretrained(f"{folder}/again")
    inputs = {
        "pixel_values": torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)),
        "input_boxes": torch.tensor([[[20.0, 30.0, 120.0, 140.0]]]),
    }
    with torch.no_grad():
        masks = [m(**inputs).pred_masks for m in (model, SamModel.from_pretrained(f"{folder}/again"))]
    assert torch.equal(*masks)
    quantizer = model.mask_decoder.transformer.layers[0].mlp.lin2.input_quantizer
    assert type(quantizer).__name__ == "MovedQuantizer" and quantizer.shift != 0
    """
    data = ["--data", calibration_folder / "images", "--data-coco", calibration_folder / "instances.json"]
    less = ["--n-images", 2, "--boxes-per-image", 2, "--steps", 2, "--set", "weight_observer=min-max"]
    command = ["quantize", nano_folder, *data, *less, "--method", "toy", "--bits", "w4a6", "--out", folder / "packed"]
    photo = min((calibration_folder / "images").glob("*.jpg"))
    python("-c", textwrap.dedent(code), folder, photo, *command, path=[outside])
    return folder


def test_its_files_name_its_grids_and_keep_all_bits_of_their_buffers(packed):
    layout = json.loads((packed / "packed" / "config.json").read_text())["quantization_config"]["layout"]
    shifted = {path: spec["input"] for path, spec in layout["layers"].items() if path.endswith("lin2")}
    assert shifted
    assert all(spec == {"grid": "toy-shifted", "bits": 6, "widened": 5} for spec in shifted.values())
    assert {spec["probs"]["grid"] for spec in layout["attentions"].values()} == {"toy-root"}
    with safe_open(packed / "packed" / "model.safetensors", "pt") as file:
        names = [f"{path}.input_quantizer.{name}" for path in shifted for name in ("scale", "shift")]
        assert {file.get_slice(name).get_dtype() for name in names} == {"F32"}
    first, second = ((packed / name / "model.safetensors").read_bytes() for name in ("packed", "again"))
    assert first == second


def test_a_change_of_its_code_makes_finished_units_stale(outside, tmp_path):
    code = """
    import sys
    from pathlib import Path

    from carsam.methods.base import registry
    from carsam.run.store import code_fingerprint

    assert "toy" in registry()
    before = code_fingerprint()
    source = Path(sys.argv[1], "toy_grids.py")
    source.write_text(source.read_text() + "# another line")
    code_fingerprint.cache_clear()
    assert code_fingerprint() != before
    """
    folder = shutil.copytree(outside, tmp_path / "site")
    python("-c", textwrap.dedent(code), folder, path=[folder])


def test_it_predicts(packed):
    pictures = list((packed / "masks").rglob("*.png"))
    assert pictures
    for path in pictures:
        with Image.open(path) as image:
            assert min(image.size) > 100


def test_without_the_package_its_files_say_what_is_missing(packed, photos):
    _, message = python("-m", "carsam", "predict", packed / "packed", photos / "a.png", "--box", "10,10,60,50", code=1)
    assert "the grid 'toy-" in message and "the package that brings this grid" in message
    assert "Traceback" not in message


def test_the_contracts_hold_it_to_what_they_ask_of_all(outside):
    """The very tests of every method and grid, over the registry with the package in it."""
    tests = [ROOT / "tests" / "methods" / "test_contract.py", ROOT / "tests" / "quantizers" / "test_grids.py"]
    options = ["-vv", "-p", "no:cacheprovider", "-k", "toy or Moved or SquareRoot"]
    output, _ = python("-m", "pytest", *tests, *options, path=[outside])
    passed = [line.partition(" ")[0].partition("::")[2] for line in output.splitlines() if " PASSED" in line]
    assert {
        "test_quantizes_packs_and_holds_integers_only[toy]",
        "test_interrupted_and_resumed_it_gives_what_it_would_have_given[toy]",
        "test_codes_stand_for_what_the_model_computes_with[toy-shifted]",
        "test_a_greater_score_never_gets_a_lesser_probability[toy-root]",
        "test_it_is_built_again_from_config_and_buffers[MovedQuantizer]",
        "test_scale_gradient_is_that_of_lsq[MovedQuantizer]",
    } <= set(passed)


def test_a_broken_package_is_left_out_with_a_warning_that_names_it(tmp_path, outside):
    announce(tmp_path, "broken-grids", "broken_grids")
    (tmp_path / "broken_grids.py").write_text("raise OSError('no such device')\n")
    announce(tmp_path, "absent-grids", "absent_grids")
    listing, messages = python("-m", "carsam", "methods", path=[outside, tmp_path])
    assert " toy " in listing and "car-sam" in listing
    assert messages.count("warning: ") == 2
    assert "broken-grids" in messages and "OSError: no such device" in messages
    assert "absent-grids" in messages and "No module named 'absent_grids'" in messages


def test_two_packages_with_one_method_are_an_error_that_names_both(tmp_path, outside):
    announce(tmp_path, "more-grids", "more_grids")
    code = """
    from dataclasses import dataclass
    from carsam.methods.rtn import Rtn

    @dataclass(frozen=True)
    class Other(Rtn):
        name = "toy"
        summary = "another"
    """
    (tmp_path / "more_grids.py").write_text(textwrap.dedent(code))
    _, message = python("-m", "carsam", "methods", path=[outside, tmp_path], code=1)
    assert "two methods are called 'toy'" in message
    assert "toy_grids.Toy" in message and "more_grids.Other" in message and "Traceback" not in message
