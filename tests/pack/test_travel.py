"""Packed models travel: from the Hub's cache, through save_pretrained and push_to_hub, with a card; without carsam."""

import copy
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import SamModel

import carsam
from carsam.commands.common import merge_results, read_results
from carsam.errors import CarsamError, CheckpointError
from carsam.pack.folder import portable, read_checksums
from carsam.pack.model_card import base_licence
from carsam.pack.source import packed_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "someone/sam-nano-w4a4"


def outputs(model, pixel_values, input_boxes):
    with torch.no_grad():
        result = model(pixel_values=pixel_values, input_boxes=input_boxes, multimask_output=False)
    return result.pred_masks, result.iou_scores


def same(first, second, pixel_values, input_boxes):
    pairs = zip(outputs(first, pixel_values, input_boxes), outputs(second, pixel_values, input_boxes))
    return all(torch.equal(a, b) for a, b in pairs)


def fill_cache(cache: Path, hub_id: str, folder: Path, revision: str = "main") -> Path:
    """A model as huggingface_hub caches it: blobs, a snapshot of links to them, and a reference."""
    place = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    for path in (snapshot, place / "blobs", place / "refs"):
        path.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        shutil.copy(path, place / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (place / "refs" / revision).write_text(COMMIT)
    return snapshot


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache of the Hub, and no connection."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_hub_id_from_the_cache(packed_folder, offline, pixel_values, input_boxes):
    fill_cache(offline, ID, packed_folder)
    expected = carsam.load(packed_folder)
    for model in (carsam.load(ID), carsam.load(ID, revision="main"), carsam.load(f"{ID}@{COMMIT}")):
        assert same(model, expected, pixel_values, input_boxes)
    with pytest.raises(CheckpointError, match=f"{ID}.*revision v9.*pass its folder"):
        carsam.load(f"{ID}@v9")


def test_hub_id_through_transformers_in_a_process(packed_folder, tmp_path):
    """As a user has it: HF_HOME, HF_HUB_OFFLINE, transformers' own call; the weights are verified there too."""
    snapshot = fill_cache(tmp_path / "home" / "hub", ID, packed_folder)
    code = (
        "import sys, carsam, transformers\n"
        "for load in (carsam.load, transformers.SamModel.from_pretrained, transformers.AutoModel.from_pretrained):\n"
        "    try:\n        print(type(load(sys.argv[1])).__name__)\n"
        "    except carsam.errors.CheckpointError as error:\n        print('refused', error)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_CACHE", None)

    def run():
        command = [sys.executable, "-c", code, ID]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout

    assert run().splitlines() == ["SamModel"] * 3
    blob = (snapshot / "model.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    content[-100] ^= 1
    blob.write_bytes(content)
    lines = run().splitlines()
    assert len(lines) == 3 and all("refused" in line and "checksum" in line for line in lines)


def test_hub_id_that_is_not_cached(offline):
    with pytest.raises(CheckpointError, match=r"someone/other is no file or folder here.*connection.*pass its folder"):
        carsam.load("someone/other")


def test_hub_id_of_a_float_model(nano_folder, offline):
    fill_cache(offline, "someone/float", nano_folder)
    assert packed_folder("someone/float") is None
    with pytest.raises(CheckpointError, match=r"is not a packed carsam model; .*load_model"):
        carsam.load("someone/float")


def test_commands_take_a_hub_id(packed_folder, offline, carsam_command, calibration_folder, tmp_path):
    fill_cache(offline, ID, packed_folder)
    result = carsam_command("info", ID)
    assert result.exit_code == 0 and "car-sam at w4a4" in result.output, result.output
    data = ("--data", calibration_folder / "images", "--out", tmp_path / "out")
    result = carsam_command("quantize", ID, *data)
    assert result.exit_code == 1 and "already quantized by carsam" in result.output


@pytest.fixture
def carsam_command():
    from typer.testing import CliRunner

    from carsam.cli import app

    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


# save_pretrained and push_to_hub


def test_save_pretrained_writes_the_same_files(packed_folder, tmp_path, pixel_values, input_boxes):
    model = carsam.load(packed_folder)
    copy.deepcopy(model).save_pretrained(tmp_path / "saved")
    names = {*read_checksums(packed_folder), "SHA256SUMS", "README.md"}
    assert {path.name for path in (tmp_path / "saved").iterdir()} == names
    for name in names:
        assert (tmp_path / "saved" / name).read_bytes() == (packed_folder / name).read_bytes()
    for load in (carsam.load, SamModel.from_pretrained):
        assert same(load(tmp_path / "saved"), model, pixel_values, input_boxes)


def test_save_pretrained_of_a_model_in_memory(nano, small_set, quick_config, tmp_path, pixel_values, input_boxes):
    model = carsam.quantize(nano, small_set, quick_config).model
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "mine.txt").write_text("mine")
    model.save_pretrained(tmp_path / "saved")
    # The file holds the rest in FP16, so what comes back differs a little from what is in memory.
    again = carsam.load(tmp_path / "saved")
    again.save_pretrained(tmp_path / "twice")
    assert same(again, carsam.load(tmp_path / "twice"), pixel_values, input_boxes)
    assert (tmp_path / "saved" / "mine.txt").read_text() == "mine"
    with pytest.raises(CarsamError, match="variant"):
        model.save_pretrained(tmp_path / "saved", variant="fp16")


def test_a_failed_save_leaves_the_old_model(packed_folder, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(packed_folder, tmp_path / "m"))
    model, before = carsam.load(folder), {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("carsam.pack.writing.save_file", full)
    with pytest.raises(CarsamError, match="No space left"):
        model.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_push_to_hub(packed_folder, monkeypatch, tmp_path, carsam_command):
    sent = {}

    def create_repo(self, repo_id, **options):
        sent["options"] = options
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **options):
        shutil.copytree(folder_path, tmp_path / repo_id)
        return repo_id

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    assert carsam.load(packed_folder).push_to_hub(ID, tags=["mine"], private=True) == ID
    assert sent["options"]["private"] is True
    assert 'carsam.load("someone/sam-nano-w4a4")' in (tmp_path / ID / "README.md").read_text()
    assert "mine" in ModelCard.load(tmp_path / ID / "README.md").data.tags
    weights = "model.safetensors"
    assert (tmp_path / ID / weights).read_bytes() == (packed_folder / weights).read_bytes()
    carsam.load(tmp_path / ID)

    result = carsam_command("push", packed_folder, "someone/again")
    assert result.exit_code == 0 and "https://huggingface.co/someone/again" in result.output

    def refuse(self, repo_id, **options):
        raise OSError("401 Client Error")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(CarsamError, match=r"cannot upload to someone/x: 401.*hf auth login"):
        carsam.load(packed_folder).push_to_hub("someone/x")


# The card, and what is kept of this machine


def test_model_card(packed_folder, tmp_path):
    folder = Path(shutil.copytree(packed_folder, tmp_path / "m"))
    card = ModelCard.load(folder / "README.md")
    assert {"carsam", "segment-anything", "mask-generation", "quantized"} <= set(card.data.tags)
    for text in ("car-sam", "w4a4", f"carsam {carsam.__version__}", "see the base model", "A stand-in", "6.0 MB"):
        assert text in card.text
    assert "carsam quantize sam-nano-256 --recipe recipe.yaml --method car-sam --bits w4a4" in card.text
    assert "Not measured yet" in card.text

    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMy own words.\n")
    scores = {"segm_ap": 14.07, "box_ap": 44.3, "mean_iou": 36.14, "n_images": 11, "n_prompts": 44}
    merge_results(folder, evaluation={"coco": str(tmp_path / "instances.json"), **scores})
    card = ModelCard.load(folder / "README.md")
    assert "| this model | 14.1 | 44.3 | 36.1 | instances.json: 11 images, 44 boxes (ground-truth boxes) |" in card.text
    assert "My own words." in card.text and "Not measured yet" not in card.text
    assert {each.metric_type: each.metric_value for each in card.data.eval_results}["mean_iou"] == 36.14
    assert read_results(folder)["evaluation"]["coco"] == "instances.json"
    carsam.load(folder)

    own = "# Mine\n"
    (folder / "README.md").write_text(own)
    merge_results(folder, evaluation=scores)
    assert (folder / "README.md").read_text() == own


def test_the_licence_is_the_base_models_own(tmp_path, monkeypatch, caplog):
    """Of its card where that states one; a README that happens to lie in the current folder is nobody's card."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    monkeypatch.chdir(tmp_path)
    assert base_licence(str(tmp_path)) == "mit"
    assert base_licence("") is None
    (tmp_path / "README.md").write_text("# A model without metadata\n")
    assert base_licence(str(tmp_path)) is None
    assert not caplog.records


def test_no_path_of_this_machine(nano_folder, quick_config, calibration_folder, tmp_path):
    images = Path(shutil.copytree(calibration_folder / "images", tmp_path / "photos"))
    base = Path(shutil.copytree(nano_folder, tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    from dataclasses import replace

    config = replace(quick_config, calibration=replace(quick_config.calibration, images=str(images)))
    result = carsam.quantize(base, str(images), config, out=tmp_path / "m")
    merge_results(tmp_path / "m", quantization=result.to_dict(), evaluation={"images": str(images), "mean_iou": 1.0})
    for path in (tmp_path / "m").iterdir():
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content and str(Path.home()).encode() + b"/" not in content, path
    recipe = yaml.safe_load((tmp_path / "m" / "recipe.yaml").read_text())
    assert recipe["model"] == "base" and recipe["calibration"]["images"] == "photos"
    assert ModelCard.load(tmp_path / "m" / "README.md").data.license == "cc-by-4.0"


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("/home/me/images", "images"),
        ("../other/images", "images"),
        ("~/images/", "images"),
        (r"C:\Users\me\images", "images"),
        ("images/train", "images/train"),
        ("facebook/sam-vit-base", "facebook/sam-vit-base"),
        ("*.neck.*", "*.neck.*"),
    ],
)
def test_portable(given, stored):
    assert portable({"a": [given, 3, None]}) == {"a": [stored, 3, None]}


def test_recipe_of_another_machine(packed_folder, carsam_command, nano_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CARSAM_CACHE", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    result = carsam_command(
        "quantize", nano_folder, "--recipe", packed_folder / "recipe.yaml", "--out", tmp_path / "again"
    )
    assert result.exit_code == 1
    assert re.search(r"named 'images', which is not here; name it with\s+--data", result.output)


@pytest.mark.skipif(os.name != "posix", reason="modes of Unix")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_modes_by_umask(umask, mode, packed_folder, tmp_path):
    model = carsam.load(packed_folder)
    old = os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "saved")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "saved").iterdir()} == {mode}


def test_unreadable_weights(packed_folder, monkeypatch):
    opened = Path.open

    def refuse(path, *arguments, **options):
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*permission denied"):
        carsam.load(packed_folder)


# Other versions, other systems, no carsam


def test_a_folder_of_the_time_before(packed_folder, tmp_path, pixel_values, input_boxes):
    """Format 1 as it first was: no card, no attention named in config.json."""
    folder = Path(shutil.copytree(packed_folder, tmp_path / "old"))
    (folder / "README.md").unlink()
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("attn_implementation").startswith("packed by carsam")
    assert config["quantization_config"]["format"] == 1
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    from carsam.pack.folder import checksums_text

    (folder / "SHA256SUMS").write_text(checksums_text(folder))
    expected = carsam.load(packed_folder)
    for load in (carsam.load, SamModel.from_pretrained):
        assert same(load(folder), expected, pixel_values, input_boxes)


@pytest.mark.parametrize(
    "call",
    [
        "SamModel.from_pretrained(sys.argv[1])",
        "pipeline('mask-generation', sys.argv[1])",
    ],
)
def test_without_carsam_the_error_names_it(call, packed_folder):
    code = f"import sys\nfrom transformers import SamModel, pipeline\n{call}\n"
    done = subprocess.run(
        [sys.executable, "-c", code, str(packed_folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert "carsam" in lines[0]
    assert any("pip install carsam, then import carsam before loading" in line for line in lines if "Error" in line)


UNIX_ONLY = ("resource", "fcntl", "pwd", "grp", "termios")


def test_loads_without_unix_only_modules(packed_folder):
    code = (
        "import sys\nfrom transformers import SamModel\n"  # what it imports on Unix is its own affair
        f"for name in {UNIX_ONLY}:\n    sys.modules[name] = None\n"
        "import carsam\nprint(type(carsam.load(sys.argv[1])).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(packed_folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "SamModel", done.stderr
