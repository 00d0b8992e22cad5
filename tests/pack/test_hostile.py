"""Packed folders that are damaged or lie: each loads as it was, or is refused at once, with the file's name."""

import json
import os
import random
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SamModel

import carsam
from carsam.errors import CheckpointError
from carsam.pack.folder import REQUIRED, checksums_text

LOADERS = [carsam.load, SamModel.from_pretrained]


@pytest.fixture
def folder(packed_folder, tmp_path):
    """A copy of the packed folder to damage."""
    return Path(shutil.copytree(packed_folder, tmp_path / "copy"))


def seal(folder):
    (folder / "SHA256SUMS").write_text(checksums_text(folder))


def refused(load, folder, match):
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=match):
        load(folder)
    assert time.perf_counter() - started < 3


# SHA256SUMS


SUMS = {
    "empty": lambda text: b"",
    "without the weights": lambda text: b"\n".join(x for x in text.splitlines() if b"model" not in x) + b"\n",
    "without the config": lambda text: b"\n".join(x for x in text.splitlines() if b" config" not in x) + b"\n",
    "no text": lambda text: b"\xff\xfe\x00" + text,
    "a path": lambda text: text.replace(b"  model.", b"  ../copy/model."),
    "a path of Windows": lambda text: text.replace(b"  model.", b"  ..\\model."),
    "a short digest": lambda text: text[1:],
    "a name twice": lambda text: text + text.splitlines()[0] + b"\n",
    "a file that is not there": lambda text: text + b"0" * 64 + b"  more.bin\n",
    "too long": lambda text: text + b"\n" * 2**20,
}


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("kind", SUMS)
def test_checksums_that_verify_nothing(kind, load, folder):
    path = folder / "SHA256SUMS"
    path.write_bytes(SUMS[kind](path.read_bytes()))
    refused(load, folder, r"SHA256SUMS|more\.bin")


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("form", ["CRLF", "upper case", "binary mark", "BOM"])
def test_checksums_in_other_forms(form, load, folder):
    path = folder / "SHA256SUMS"
    text = path.read_bytes()
    if form == "upper case":
        text = b"".join(line[:64].upper() + line[64:] for line in text.splitlines(keepends=True))
    changed = {
        "CRLF": text.replace(b"\n", b"\r\n"),
        "binary mark": text.replace(b"  ", b" *"),
        "BOM": b"\xef\xbb\xbf" + text,
    }
    path.write_bytes(changed.get(form, text))
    (folder / "my notes.txt").write_text("a user's own file does not matter")
    assert not load(folder).training


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", REQUIRED)
def test_a_flipped_bit(name, load, folder):
    content = bytearray((folder / name).read_bytes())
    content[2 * len(content) // 3] ^= 1
    (folder / name).write_bytes(content)
    if load is carsam.load or name != "config.json":
        refused(load, folder, rf"{name}.*checksum")
    else:  # transformers reads it first, and may refuse it in its own words
        with pytest.raises((ValueError, OSError)):
            load(folder)


# config.json with checksums that fit


def change(config, path, value):
    *parents, last = path
    for key in parents:
        config = config[key]
    if value is DELETE:
        del config[last]
    else:
        config[last] = value


DELETE = object()
QKV = ("quantization_config", "layout", "layers", "vision_encoder.layers.0.attn.qkv")
SELF = ("quantization_config", "layout", "attentions", "mask_decoder.transformer.layers.0.self_attn")
CONFIGS = [
    (("vision_config", "hidden_size"), 10**9),
    (("vision_config", "hidden_size"), 10**30),
    (("vision_config", "hidden_size"), 96),
    (("vision_config", "hidden_size"), "192"),
    (("vision_config", "num_hidden_layers"), 10**6),
    (("vision_config", "num_hidden_layers"), 7),
    (("vision_config", "image_size"), -1),
    (("vision_config", "num_attention_heads"), 0),
    (("mask_decoder_config", "num_hidden_layers"), 10**6),
    (("mask_decoder_config", "num_multimask_outputs"), 10**6),
    (("mask_decoder_config", "iou_head_depth"), 10**6),
    (("prompt_encoder_config", "num_point_embeddings"), 10**6),
    (("quantization_config", "layout"), []),
    (("quantization_config", "layout"), DELETE),
    (("quantization_config", "layout", "layers"), ["a"]),
    (("quantization_config", "layout", "attentions"), {}),
    (("quantization_config", "format"), "1"),
    (("quantization_config", "bits"), ["w4a4"]),
    (QKV, 4),
    ((*QKV, "weight"), "4"),
    ((*QKV, "weight"), -4),
    ((*QKV, "weight"), 8),
    ((*QKV, "weight"), True),
    ((*QKV, "weight"), float("nan")),
    ((*QKV, "input"), DELETE),
    ((*QKV, "input", "bits"), -4),
    ((*QKV, "input", "grid"), "spline"),
    ((*QKV, "input", "grid"), {}),
    ((*QKV, "input", "groups"), 10**9),
    ((*QKV, "input"), {"grid": "grouped", "bits": 4, "groups": 10**9, "channels": 192}),
    ((*SELF, "probs"), DELETE),
    ((*SELF, "probs"), {"grid": "log2", "bits": 4}),
    ((*SELF, "values"), {"grid": "uniform", "bits": 4}),
]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(("path", "value"), CONFIGS)
def test_a_config_that_lies(path, value, load, folder):
    config = json.loads((folder / "config.json").read_text())
    change(config, path, value)
    (folder / "config.json").write_text(json.dumps(config))
    seal(folder)
    if load is carsam.load:
        refused(load, folder, r"config\.json|grid|format|model\.safetensors")
    else:  # transformers reads some settings before carsam is asked, and refuses their types in its own words
        started = time.perf_counter()
        with pytest.raises(Exception) as caught:
            load(folder)
        assert not isinstance(caught.value, MemoryError) and time.perf_counter() - started < 3


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(("channels", "maps"), [(5, 0), (192, 1)])
def test_a_grid_that_is_not_of_its_layer_though_file_and_config_agree(channels, maps, load, folder):
    config = json.loads((folder / "config.json").read_text())
    change(config, (*QKV, "input"), {"grid": "shifted", "bits": 4, "channels": channels, "maps": maps})
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    site = "vision_encoder.layers.0.attn.qkv.input_quantizer"
    del tensors[f"{site}.zero_point"]
    save_file(
        tensors | {f"{site}.shift": torch.zeros(channels)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    seal(folder)
    refused(load, folder, "the layer reads 192 channels, not 5" if channels == 5 else "maps is 0 at a layer")


TEXTS = {
    "nested": "[" * 100_000,
    "nested mapping": '{"a":' * 100_000,
    "a name twice": '{"model_type": "sam", "model_type": "sam"}',
    "digits": '{"model_type": ' + "9" * 100_000 + "}",
    "no mapping": "[1, 2]",
    "cut short": '{"model_type"',
    "too long": " " * (9 * 2**20) + "{}",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_config_that_is_no_config(kind, folder):
    (folder / "config.json").write_text(TEXTS[kind])
    seal(folder)
    refused(carsam.load, folder, r"config\.json")


# Weights with checksums that fit

LIN = "mask_decoder.transformer.layers.0.mlp.lin1"
VALUES = {
    f"{LIN}.weight_scale": lambda t: t.neg(),
    f"{LIN}.weight_zero_point": lambda t: torch.full_like(t, 16),
    f"{LIN}.input_quantizer.scale": lambda t: torch.full_like(t, float("nan")),
    f"{LIN}.input_quantizer.zero_point": lambda t: torch.full_like(t, 99),
    f"{LIN}.bias": lambda t: torch.full_like(t, float("inf")),
    f"{LIN}.weight": lambda t: t[:-1],
    "vision_encoder.layers.0.layer_norm1.weight": lambda t: t.to(torch.int64),
    "vision_encoder.layers.1.attn.matmul.key.zero_point": lambda t: t.to(torch.float32),
}


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", VALUES)
def test_a_tensor_that_cannot_be(name, load, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = VALUES[name](tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    seal(folder)
    refused(load, folder, "get it again|damaged")


def header(length, text=b"{}"):
    return struct.pack("<Q", length) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        header(2**62),
        header(2**25, b"{" * 2**10),
        header(4, b"[[[["),
        header(72, b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000]}}'.ljust(72)),
    ],
)
def test_a_header_that_lies(content, folder):
    (folder / "model.safetensors").write_bytes(content)
    seal(folder)
    refused(carsam.load, folder, r"model\.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of Unix")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "SHA256SUMS"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling link", "loop"])
def test_what_is_no_file(kind, name, folder):
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere" if kind == "dangling link" else name)
    refused(carsam.load, folder, name)


def test_a_link_to_the_weights_is_fine(folder, tmp_path):
    shutil.move(folder / "model.safetensors", tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert isinstance(carsam.load(folder), SamModel)


def test_another_weights_file_is_refused(folder):
    """transformers takes the name of the weights from config.json; SHA256SUMS vouches for one name only."""
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (folder / "config.json").write_text(json.dumps(config))
    seal(folder)
    for load in LOADERS:
        refused(load, folder, r"other\.safetensors")


# At random


def test_mutations(packed_folder, tmp_path, pixel_values, input_boxes):
    """Bytes flipped, removed, added or moved in any file: never other values, never another error (carsam.load)."""
    generator = random.Random(0)

    def outputs(model):
        with torch.no_grad():
            return model(pixel_values=pixel_values, input_boxes=input_boxes, multimask_output=False).pred_masks

    expected = outputs(carsam.load(packed_folder))
    names = sorted([*REQUIRED, "SHA256SUMS"])
    for number in range(60):
        folder = tmp_path / str(number)
        folder.mkdir()
        name = generator.choice(names)
        for path in packed_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes()) if path.name == name else os.link(
                path, folder / path.name
            )
        content = bytearray((folder / name).read_bytes())
        place = generator.randrange(len(content))
        kind = generator.choice(("flip", "cut", "insert", "zero", "swap"))
        if kind == "flip":
            content[place] ^= 1 << generator.randrange(8)
        elif kind == "cut":
            del content[place : place + generator.randrange(1, 50)]
        elif kind == "insert":
            content[place:place] = generator.randbytes(generator.randrange(1, 50))
        elif kind == "zero":
            content[place : place + 20] = bytes(len(content[place : place + 20]))
        else:
            content = content[place:] + content[:place]
        (folder / name).write_bytes(content)
        for load in LOADERS:
            try:
                model = load(folder)
            except CheckpointError:
                continue
            except (OSError, ValueError, RuntimeError, TypeError) as error:
                assert load is not carsam.load, (name, kind, error)
                continue
            assert torch.equal(outputs(model), expected), (name, kind, place)
        shutil.rmtree(folder)
