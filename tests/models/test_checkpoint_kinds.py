"""Checkpoints of every form that people have: loaded, or named with what helps and loses nothing."""

import gzip
import io
import json
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from carsam.errors import CheckpointError
from carsam.models.load import load_model
from carsam.models.sam.meta import state_dict_to_meta


@pytest.fixture(scope="module")
def state(nano):
    return {name: tensor.clone() for name, tensor in state_dict_to_meta(nano).items()}


@pytest.fixture
def folder(nano_folder, tmp_path):
    return Path(shutil.copytree(nano_folder, tmp_path / "model"))


def same(model, state):
    ours = state_dict_to_meta(model)
    return ours.keys() == state.keys() and all(torch.equal(ours[name], state[name]) for name in state)


# --- what loads ---


def test_metas_form_in_safetensors(state, tmp_path):
    save_file({f"sam.{name}": value for name, value in state.items()}, tmp_path / "fine-tune.safetensors")
    assert same(load_model(tmp_path / "fine-tune.safetensors"), state)


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_metas_form_in_a_transformers_folder(state, nano_folder, tmp_path, name, config):
    if config:
        shutil.copy(nano_folder / "config.json", tmp_path)
    save = save_file if name.endswith("safetensors") else torch.save
    save(state, tmp_path / name)
    assert same(load_model(tmp_path), state)


def test_metas_form_as_bin_and_as_lightnings_ckpt(state, tmp_path):
    torch.save(state, tmp_path / "sam.bin")
    assert same(load_model(tmp_path / "sam.bin"), state)
    wrapped = {f"model.sam.{name}": value for name, value in state.items()}
    torch.save({"state_dict": wrapped, "epoch": 3, "loops": {"fit": {"x": 1}}}, tmp_path / "last.ckpt")
    assert same(load_model(tmp_path / "last.ckpt"), state)


@pytest.mark.parametrize("prefix", ["module.", "model.", "sam.", "module.model."])
def test_a_transformers_folder_with_prefixed_names(nano, folder, prefix):
    weights = load_file(folder / "model.safetensors")
    save_file({f"{prefix}{name}": value for name, value in weights.items()}, folder / "model.safetensors")
    loaded = load_model(folder)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in nano.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(state, tmp_path, dtype):
    torch.save({name: value.to(dtype) for name, value in state.items()}, tmp_path / "x.pth")
    loaded = state_dict_to_meta(load_model(tmp_path / "x.pth"))
    assert all(torch.equal(loaded[name], state[name].to(dtype).float()) for name in state)


@pytest.mark.parametrize("new_zip", [True, False])
def test_numpys_numbers_beside_the_weights(state, tmp_path, new_zip):
    beside = {"loss": np.float64(0.5), "epoch": np.int64(3), "best": np.float32(1), "history": np.arange(3.0)}
    torch.save({"model": state, **beside}, tmp_path / "x.pth", _use_new_zipfile_serialization=new_zip)
    assert same(load_model(tmp_path / "x.pth"), state)


def test_tensors_outside_the_prefix_are_left_out_with_a_warning(state, tmp_path, caplog):
    content = {f"sam.{name}": value for name, value in state.items()} | {"criterion.weight": torch.ones(2)}
    torch.save(content, tmp_path / "x.pth")
    assert same(load_model(tmp_path / "x.pth"), state)
    assert "criterion.weight was left out" in caplog.text


# --- what is named ---


def zipped(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "."), content)
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 375042383\n"
PLACEHOLDERS = {
    "git-lfs": (LFS, "git-lfs' pointer .*git lfs pull"),
    "web page": (b"\n<!DOCTYPE html><html>404</html>", "web page"),
    "empty": (b"", "is empty"),
    "gzip": (gzip.compress(b"x"), "gzip archive: unpack it"),
    "zip of a checkpoint": (zipped(sam__pth=b"x"), r"zip archive with sam\.pth: unpack it first"),
    "zip of others": (zipped(a__txt=b"x"), r"zip archive with a\.txt"),
    "empty zip": (zipped(), "empty zip"),
    "zeros": (bytes(999), "damaged"),
}


@pytest.mark.parametrize(("content", "message"), PLACEHOLDERS.values(), ids=PLACEHOLDERS)
def test_what_is_no_checkpoint(content, message, tmp_path):
    (tmp_path / "sam.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(tmp_path / "sam.pth")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["git-lfs", "web page", "empty"])
def test_placeholders_in_a_folder(folder, name, kind):
    (folder / "model.safetensors").unlink()
    content, message = PLACEHOLDERS[kind]
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"damaged or cut short.*{message}"):
        load_model(folder)


NAMED = {
    "decoder only": (
        lambda s: {k: v for k, v in s.items() if k.startswith("mask_decoder")},
        "mask decoder without an image encoder",
    ),
    "LoRA": (lambda s: {"w_a_000": torch.ones(1), "w_b_000": torch.ones(1)}, "holds an adapter"),
    "PEFT": (lambda s: {"base_model.x.lora_A.weight": torch.ones(1)}, "holds an adapter"),
    "SAM-HQ": (lambda s: {**s, "mask_decoder.hf_token.weight": torch.ones(1, 256)}, "It is SAM-HQ"),
    "adapters": (lambda s: {**s, "image_encoder.blocks.0.Adapter.fc.weight": torch.ones(1)}, "It has adapters"),
    "SAM 2": (lambda s: {"model": {"image_encoder.trunk.x": torch.ones(1)}}, "a part of a SAM 2 checkpoint"),
    "MobileSAM": (lambda s: {"image_encoder.layers.0.x": torch.ones(1)}, "MobileSAM"),
    "optimizer": (lambda s: {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": []}, "holds state"),
}


@pytest.mark.parametrize(("make", "message"), NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("name", ["x.pth", "x.bin"])
def test_other_models_are_named_and_no_fine_tune_is_given_up(state, make, message, name, tmp_path):
    torch.save(make(state), tmp_path / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(tmp_path / name)
    assert "Use a file such as" not in str(caught.value)


def test_a_trainers_folder_names_its_checkpoints(folder, tmp_path):
    trainer = tmp_path / "trainer"
    for step in (500, 1000):
        shutil.copytree(folder, trainer / f"checkpoint-{step}")
    torch.save({}, trainer / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"pass one of the folders in it: .*checkpoint-500, .*checkpoint-1000\."):
        load_model(trainer)


def test_a_trainers_checkpoint_without_config_never_suggests_the_optimizer(folder):
    (folder / "config.json").unlink()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({}, folder / name)
    with pytest.raises(CheckpointError, match=r"copy the config\.json of the model that it was trained from") as caught:
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pass a folder that has one") as caught:
        load_model(folder)
    assert "optimizer" not in str(caught.value) and "rng_state" not in str(caught.value)
    (folder / "best_sam.pth").touch()
    with pytest.raises(CheckpointError, match=r"pass the file itself: .*best_sam\.pth"):
        load_model(folder)


# --- what claims more than it holds ---


@pytest.mark.parametrize(
    "name",
    [
        "mask_decoder.iou_prediction_head.layers.3000000.weight",
        "image_encoder.blocks.3000000.norm1.weight",
        "prompt_encoder.point_embeddings.3000000.weight",
        "mask_decoder.transformer.layers.3000000.norm1.weight",
        "mask_decoder.output_hypernetworks_mlps.3000000.layers.0.weight",
        f"image_encoder.blocks.{'9' * 5000}.norm1.weight",
    ],
)
def test_a_layers_number_is_no_count(state, tmp_path, name):
    torch.save({**state, name: torch.ones(1)}, tmp_path / "x.pth")
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="has tensors that SAM does not"):
        load_model(tmp_path / "x.pth")
    assert time.perf_counter() - started < 3


TOKENS = "mask_decoder.mask_tokens.weight"
CLAIMS = {
    "stride 0": (lambda s: {**s, TOKENS: torch.zeros(1).expand(10**7, 10**5)}, "claim more numbers than the file"),
    "one storage": (lambda s: {**s, **{f"x.{i}": s[TOKENS].expand(4, 256) for i in range(3)}}, "SAM does not"),
    "empty": (lambda s: {**s, TOKENS: torch.zeros(10**9, 0)}, "mask_tokens.weight is empty"),
    "many tokens": (lambda s: {**s, TOKENS: torch.zeros(10**6, 1)}, "1000000 mask tokens with 4 mask heads"),
    "sparse": (lambda s: {**s, TOKENS: torch.zeros(4, 256).to_sparse()}, "sparse"),
}


@pytest.mark.parametrize(("make", "message"), CLAIMS.values(), ids=CLAIMS)
def test_claims_without_content(state, make, message, tmp_path):
    torch.save(make(state), tmp_path / "x.pth")
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "x.pth")
    assert time.perf_counter() - started < 3


@pytest.mark.parametrize("changes", [{"hidden_size": 10**9}, {"num_hidden_layers": 10**6}, {"image_size": 10**9}])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_folders_declared_sizes(folder, changes, weights):
    if weights.endswith("bin"):
        torch.save(load_file(folder / "model.safetensors"), folder / weights)
        (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="vision_config." + next(iter(changes))):
        load_model(folder)
    assert time.perf_counter() - started < 1
