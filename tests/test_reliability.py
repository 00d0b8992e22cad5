"""Interrupted, damaged, incomplete, out of space: whole results or an error, never something in between."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import SamModel

import carsam
from carsam.calibrate.cache import CacheSpace
from carsam.errors import CarsamError, CheckpointError
from carsam.methods.base import create
from carsam.models.family import find_sites
from carsam.models.prepare import prepare_model
from carsam.pack.checkpoint import save_packed
from carsam.pack.folder import sha256
from carsam.pack.layout import pack
from carsam.quantizers import simulate

PACKED_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml")


def files(folder: Path) -> dict[str, bytes]:
    """Contents by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def quantize(model, config, **options):
    return carsam.quantize(model, config.calibration.images, config, **options)


def outputs(model, pixel_values, boxes):
    with torch.no_grad():
        result = model(pixel_values=pixel_values, input_boxes=boxes, multimask_output=False)
    return result.pred_masks, result.iou_scores


def assert_equal_outputs(first, second, pixel_values, boxes):
    for a, b in zip(outputs(first, pixel_values, boxes), outputs(second, pixel_values, boxes)):
        assert torch.equal(a, b)


def renew_checksums(folder: Path) -> None:
    """Makes an altered folder look whole."""
    (folder / "SHA256SUMS").write_text("".join(f"{sha256(folder / name)}  {name}\n" for name in PACKED_FILES))


@pytest.fixture
def copied(packed_folder, tmp_path):
    """A copy of the packed folder to damage."""
    return Path(shutil.copytree(packed_folder, tmp_path / "copy"))


# Repeatable, interruptible


def test_same_seed_same_bytes(nano_folder, quick_config, packed_folder, tmp_path):
    quantize(nano_folder, quick_config, out=tmp_path / "again")
    assert files(tmp_path / "again") == files(packed_folder)


def test_another_seed_other_bytes(nano_folder, quick_config, packed_folder, tmp_path):
    config = replace(quick_config, calibration=replace(quick_config.calibration, seed=1))
    quantize(nano_folder, config, out=tmp_path / "other")
    assert files(tmp_path / "other")["model.safetensors"] != files(packed_folder)["model.safetensors"]


KILLED_RUN = """
import json, os, signal, sys
import carsam

def progress(unit, n_units, name, step, n_steps):
    if (unit, step) == (6, 1):
        os.kill(os.getpid(), signal.SIGKILL)

model, out, config = sys.argv[1:]
config = carsam.QuantizeConfig.from_dict(json.loads(config))
carsam.quantize(model, config.calibration.images, config, out=out, progress=progress)
"""


def test_killed_and_resumed(nano_folder, quick_config, packed_folder, tmp_path):
    """After SIGKILL in the midst of a unit, a resumed run gives the bytes of an uninterrupted one."""
    out, partial = tmp_path / "killed", tmp_path / "killed.partial"
    command = [sys.executable, "-c", KILLED_RUN, str(nano_folder), str(out), json.dumps(quick_config.to_dict())]
    assert subprocess.run(command, timeout=300, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    finished = sorted(partial.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    assert len(finished) == 6

    # The last unit's file is damaged as well: then it is a unit that is not finished.
    with finished[-1].open("r+b") as file:
        file.truncate(1000)
    worked = set()
    quantize(
        nano_folder,
        quick_config,
        out=out,
        resume=True,
        progress=lambda unit, _n, _name, step, _steps: worked.add(unit) if step else None,
    )
    assert worked == set(range(5, 14))
    assert files(out) == files(packed_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["killed"]


# Damaged folders


@pytest.mark.parametrize("name", [*PACKED_FILES, "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_damaged_files(damage, name, copied):
    path = copied / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checksum|lacks|damaged|SHA256SUMS"):
        carsam.load(copied)


def test_not_a_packed_folder(nano_folder, tmp_path):
    for folder in (nano_folder, tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError):
            carsam.load(folder)


# One tensor of every kind that a packed file holds.
TENSORS = (
    "mask_decoder.transformer.layers.0.mlp.lin1.weight",
    "mask_decoder.transformer.layers.0.mlp.lin1.weight_scale",
    "mask_decoder.transformer.layers.0.mlp.lin1.weight_zero_point",
    "mask_decoder.transformer.layers.0.mlp.lin1.bias",
    "mask_decoder.transformer.layers.0.mlp.lin1.input_quantizer.scale",
    "mask_decoder.transformer.layers.0.mlp.lin1.input_quantizer.zero_point",
    "vision_encoder.layers.1.attn.matmul.key.scale",
    "vision_encoder.layers.1.attn.matmul.probs.quantizer.scale",
    "vision_encoder.layers.0.layer_norm1.weight",
    "shared_image_embedding.positional_embedding",
)


@pytest.mark.parametrize("loader", [carsam.load, SamModel.from_pretrained])
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_missing(name, loader, copied):
    path = copied / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    renew_checksums(copied)
    with pytest.raises(CheckpointError, match=r"damaged|does not hold"):
        loader(copied)


@pytest.mark.parametrize("loader", [carsam.load, SamModel.from_pretrained])
def test_a_layout_of_another_model(loader, copied):
    config = json.loads((copied / "config.json").read_text())
    layers = config["quantization_config"]["layout"]["layers"]
    layers["vision_encoder.layers.99.attn.qkv"] = layers.pop("vision_encoder.layers.0.attn.qkv")
    (copied / "config.json").write_text(json.dumps(config))
    renew_checksums(copied)
    with pytest.raises(CheckpointError, match=r"vision_encoder\.layers\.99"):
        loader(copied)


@pytest.mark.parametrize("loader", [carsam.load, SamModel.from_pretrained])
def test_a_later_format(loader, copied):
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["format"] = 99
    (copied / "config.json").write_text(json.dumps(config))
    renew_checksums(copied)
    with pytest.raises(CheckpointError, match="format 99"):
        loader(copied)


# transformers' own way of loading


def test_transformers_without_carsam(packed_folder):
    """Codes are never taken for weights: without the import, no model comes back."""
    code = (
        "import sys\nfrom transformers import SamModel\n"
        "try:\n    SamModel.from_pretrained(sys.argv[1])\n"
        "except Exception as error:\n    print(type(error).__name__, error, file=sys.stderr)\n    sys.exit(3)\n"
        "finally:\n    assert 'carsam' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(packed_folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 3, done.stderr


def test_transformers_with_carsam(packed_folder, pixel_values, input_boxes):
    model = SamModel.from_pretrained(packed_folder)
    assert not model.training
    assert_equal_outputs(model, carsam.load(packed_folder), pixel_values, input_boxes)


def test_saved_again_by_transformers(packed_folder, tmp_path, pixel_values, input_boxes):
    model = carsam.load(packed_folder)
    model.save_pretrained(tmp_path / "saved")
    again = SamModel.from_pretrained(tmp_path / "saved")
    assert_equal_outputs(model, again, pixel_values, input_boxes)
    stored, saved = (load_file(f / "model.safetensors") for f in (packed_folder, tmp_path / "saved"))
    for name, value in stored.items():
        if value.dtype == torch.uint8:
            assert torch.equal(value, saved[name])


def test_the_returned_model_is_the_files(nano, small_set, quick_config, tmp_path, pixel_values, input_boxes):
    result = carsam.quantize(nano, small_set, quick_config, out=tmp_path / "q")
    assert_equal_outputs(result.model, carsam.load(tmp_path / "q"), pixel_values, input_boxes)


# No space


@contextlib.contextmanager
def largest_file(size: int):
    """Writes beyond ``size`` bytes fail, as on a full disk (EFBIG in place of ENOSPC)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("size", "stage"), [(100_000, "a unit's file"), (4_000_000, "the model"), (2_000_000, "a unit or the model")]
)
def test_no_space(size, stage, nano_folder, quick_config, tmp_path):
    with largest_file(size), pytest.raises(CarsamError, match=r"[Ff]ree space"):
        quantize(nano_folder, quick_config, out=tmp_path / "out")
    left = list(tmp_path.rglob("*"))
    assert not (tmp_path / "out").exists()
    assert not [path for path in left if path.suffix == ".tmp"]
    # Finished units stay for --resume; nothing else does.
    assert {path.name for path in tmp_path.iterdir()} <= {"out.partial"}


@pytest.mark.parametrize("name", ["config.json", "recipe.yaml", "SHA256SUMS"])
def test_no_space_for_a_small_file(name, packed_folder, tmp_path, monkeypatch):
    """The old folder is still there, whole, when writing over it fails."""
    target = Path(shutil.copytree(packed_folder, tmp_path / "out"))
    recipe, model = yaml.safe_load((target / "recipe.yaml").read_text()), carsam.load(target)
    write = Path.write_text

    def full(path, *arguments, **options):
        if path.name == name:
            write(path, "half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(CarsamError, match="No space left"):
            save_packed(model, target, recipe, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert files(target) == files(packed_folder)


def test_no_space_for_activations(tmp_path):
    space = CacheSpace(budget=0, directory=tmp_path)
    with largest_file(1000), pytest.raises(CarsamError, match="temporary"):
        space.keep(torch.zeros(10_000))


def test_read_only_place(nano_folder, quick_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CarsamError, match="cannot"):
        quantize(nano_folder, quick_config, out=tmp_path / "file" / "out")


# Steps out of order


def test_simulation_before_calibration(fresh_nano, quick_config, pixel_values):
    method, sites = create("rtn"), find_sites(fresh_nano)
    prepare_model(fresh_nano, sites, quick_config.bit_plan(), method.quantizer_for, method.softmax_for)
    with simulate(weights=False, activations=True), pytest.raises(RuntimeError, match="calibration"):
        fresh_nano.get_image_embeddings(pixel_values)
    with simulate(weights=True), pytest.raises(RuntimeError, match="calibration"):
        fresh_nano.get_image_embeddings(pixel_values)
    with pytest.raises(RuntimeError, match=r"reconstruction|calibration"):
        pack(fresh_nano, sites)
