"""Loading: what is accepted, and what every bad source says."""

import collections
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from places import NANO
from safetensors.torch import load_file, save_file
from transformers.models.sam.modeling_sam import SamVisionAttention

from carsam.errors import CheckpointError, ConfigError
from carsam.models.load import is_hub_id, load_model
from carsam.models.sam.meta import TWO_WAY_EPS, state_dict_to_meta
from carsam.models.sam.random import random_sam

PIXELS = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
BOX = torch.tensor([[[40.0, 30.0, 200.0, 180.0]]])


@torch.no_grad()
def logits(model):
    return model(pixel_values=PIXELS, input_boxes=BOX).pred_masks


@pytest.fixture(scope="module")
def nano():
    """The embedded model with Meta's eps in the decoder, as it comes back from Meta's form."""
    model = load_model(NANO)
    for layer in model.mask_decoder.transformer.layers:
        for norm in (layer.layer_norm1, layer.layer_norm2, layer.layer_norm3, layer.layer_norm4):
            norm.eps = TWO_WAY_EPS
    return model


@pytest.fixture(scope="module")
def state(nano):
    return state_dict_to_meta(nano)


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model to damage."""
    return Path(shutil.copytree(NANO, tmp_path / "model"))


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# --- what is accepted ---


def test_folder_gives_a_frozen_float32_eager_model():
    model = load_model(str(NANO))
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # stored in FP16
    assert not any(p.requires_grad for p in model.parameters())
    assert all(type(layer.attn) is SamVisionAttention for layer in model.vision_encoder.layers)
    assert model.config._attn_implementation == "eager"
    assert (
        model.prompt_encoder.shared_embedding.positional_embedding is model.shared_image_embedding.positional_embedding
    )


@pytest.mark.parametrize("kept", ["shared_image_embedding", "prompt_encoder.shared_embedding"])
def test_folder_may_hold_either_name_of_the_tied_matrix(folder, kept):
    def rename(weights):
        weights[f"{kept}.positional_embedding"] = weights.pop("shared_image_embedding.positional_embedding")

    edit_weights(folder, rename)
    model, expected = load_model(folder), load_model(NANO)
    for part in (model.shared_image_embedding, model.prompt_encoder.shared_embedding):
        assert torch.equal(part.positional_embedding, expected.shared_image_embedding.positional_embedding)


def test_metas_form_round_trips(nano, state, tmp_path):
    path = tmp_path / "nano.pth"
    torch.save(state, path)
    model = load_model(path)
    assert state.keys() == state_dict_to_meta(model).keys()
    for name, tensor in state_dict_to_meta(model).items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(logits(model), logits(nano))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert type(model.vision_encoder.layers[0].attn) is SamVisionAttention


WRAPPED = {
    "model": lambda state: {"model": state, "optimizer": {"param_groups": [{"lr": 1e-4}]}, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state},
    "prefix": lambda state: {f"module.{key}": value for key, value in state.items()},
    "both": lambda state: {"model_state_dict": {f"module.sam.{key}": value for key, value in state.items()}},
    "ordered": collections.OrderedDict,
    "buffers": lambda state: {**state, "pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("new_zip", [True, False], ids=["zip", "legacy"])
def test_wrapped_meta_files(state, wrap, new_zip, tmp_path):
    path = tmp_path / "finetune.pt"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=new_zip)
    loaded = state_dict_to_meta(load_model(path))
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_half_precision_meta_file_is_upcast(state, tmp_path):
    path = tmp_path / "half.pth"
    torch.save({name: tensor.half() for name, tensor in state.items()}, path)
    loaded = state_dict_to_meta(load_model(path))
    assert all(torch.equal(loaded[name], state[name].half().float()) for name in state)


def test_meta_file_without_windows_or_qkv_bias(tmp_path):
    """Odd fine-tunes: all blocks global, another image size, no bias in QKV."""
    model = random_sam("nano", image_size=112)  # 7 patches: the window is the grid
    state = {k: v for k, v in state_dict_to_meta(model).items() if not k.endswith("qkv.bias")}
    torch.save(state, tmp_path / "odd.pth")
    vision = load_model(tmp_path / "odd.pth").config.vision_config
    assert (vision.image_size, vision.window_size, vision.qkv_bias) == (112, 7, False)
    assert vision.global_attn_indexes == list(range(8))


# --- Meta files that are refused ---


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("new_zip", [True, False], ids=["zip", "legacy"])
def test_pickled_code_is_refused_and_not_run(state, new_zip, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    torch.save({**state, "x": Malicious(marker)}, path, _use_new_zipfile_serialization=new_zip)
    with pytest.raises(CheckpointError, match=r"contains pickled code \(\w+\.system\) and was refused"):
        load_model(path)
    assert not marker.exists()


def without(state, *names):
    return {key: value for key, value in state.items() if key not in names}


LIN1 = "image_encoder.blocks.3.mlp.lin1.weight"
POS = "image_encoder.pos_embed"
NOT_SAM = {
    "a tensor": (lambda s: torch.zeros(3), "is not a SAM checkpoint: .* holds a Tensor"),
    "empty": (lambda s: {}, "is not a SAM checkpoint"),
    "ResNet": (lambda s: {"fc.weight": torch.zeros(2, 2)}, r"no image_encoder\.patch_embed.* holds fc\.weight"),
    "SAM 2": (
        lambda s: {"model": {"image_encoder.trunk.patch_embed.proj.weight": torch.zeros(1)}},
        r"patch_embed\.proj\.weight has shape \(1,\), not 4 dimensions as in SAM 2",
    ),
    "MobileSAM": (lambda s: {"image_encoder.layers.0.c.weight": torch.zeros(1)}, "the TinyViT of MobileSAM"),
    "transformers": (lambda s: {"vision_encoder.layers.0.x": torch.zeros(1)}, "pass the folder"),
    "encoder only": (
        lambda s: {k: v for k, v in s.items() if k.startswith("image_encoder")},
        r"mask_decoder\.iou_token\.weight is missing",
    ),
    "missing": (lambda s: without(s, LIN1), rf"{LIN1} missing"),
    "no positions": (lambda s: without(s, POS), f"{POS} is missing"),
    "SAM-HQ": (lambda s: {**s, "mask_decoder.hf_token.weight": torch.zeros(1, 256)}, r"SAM does not: .*hf_token"),
    "wrong shape": (lambda s: {**s, LIN1: s[LIN1][:5]}, r"does not fit together: .*lin1\.weight \(5, 192\)"),
    "wrong dimensions": (lambda s: {**s, POS: s[POS][0]}, r"pos_embed has shape .* not 4 dimensions"),
    "resized positions": (lambda s: {**s, POS: s[POS][:, :14, :14]}, r"expected one window size.*resize rel_pos"),
    "oblong": (lambda s: {**s, POS: s[POS][:, :14]}, "square inputs only"),
    "integers": (lambda s: {**s, LIN1: s[LIN1].to(torch.int8)}, r"lin1\.weight in torch\.int8"),
    "NaN": (lambda s: {**s, LIN1: s[LIN1] * torch.nan}, "NaN or infinite weights"),
}


@pytest.mark.parametrize(("make", "message"), NOT_SAM.values(), ids=NOT_SAM)
def test_not_a_sam(state, make, message, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(make(state), path)
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("new_zip", [True, False], ids=["zip", "legacy"])
def test_truncated_meta_file(state, share, new_zip, tmp_path):
    path = tmp_path / "cut.pth"
    torch.save(state, path, _use_new_zipfile_serialization=new_zip)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(CheckpointError, match="damaged, cut short or of another kind"):
        load_model(path)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\n", bytes(999)])
def test_file_of_another_kind(content, tmp_path):
    (tmp_path / "page.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged, cut short or of another kind"):
        load_model(tmp_path / "page.pth")


# --- folders that are refused ---

BAD_CONFIG = {
    "other model": ({"model_type": "clip"}, "'clip', not \"sam\""),
    "SAM 2": ({"model_type": "sam2_video"}, r"does not describe a SAM 2: vision_config\.backbone_config"),
    "carsam": ({"quantization_config": {"quant_method": "carsam"}}, r"already quantized by carsam; .*carsam\.load\("),
    "other method": ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
    "wrong width": (
        {"vision_config": {"hidden_size": 384}},
        r"vision_config\.hidden_size is 384, but its weights have 192",
    ),
    "wrong type": ({"vision_config": {"hidden_size": "a"}}, "does not describe a SAM"),
    "no heads": ({"vision_config": {"num_attention_heads": 0}}, "does not describe a SAM"),
    "deeper": ({"vision_config": {"num_hidden_layers": 9}}, r"num_hidden_layers is 9, but its weights have 8"),
    "shallower": ({"vision_config": {"num_hidden_layers": 7}}, r"num_hidden_layers is 7, but its weights have 8"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIG.values(), ids=BAD_CONFIG)
def test_bad_config(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


BAD_FOLDER = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json .*cannot be read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "needs config.json and model.safetensors"),
    "empty weights": (lambda f: os.truncate(f / "model.safetensors", 0), "damaged or cut short"),
    "truncated weights": (lambda f: os.truncate(f / "model.safetensors", 100_000), "damaged or cut short"),
    "missing key": (
        lambda f: edit_weights(f, lambda w: w.pop("vision_encoder.neck.conv1.weight")),
        r"missing weights: vision_encoder\.neck\.conv1\.weight\.",
    ),
    "unexpected key": (
        lambda f: edit_weights(f, lambda w: w.update(adapter=torch.zeros(1))),
        r"unexpected weights: adapter\.",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD_FOLDER.values(), ids=BAD_FOLDER)
def test_bad_folder(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_garbage_in_a_bin_file(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load_model(folder)


def test_folder_with_a_meta_file_points_to_it(tmp_path):
    (tmp_path / "sam_vit_b_01ec64.pth").touch()
    with pytest.raises(CheckpointError, match=r"pass the file itself: .*sam_vit_b_01ec64\.pth"):
        load_model(tmp_path)


def test_weights_file_of_a_folder_points_to_the_folder():
    with pytest.raises(CheckpointError, match="pass its folder"):
        load_model(NANO / "model.safetensors")


# --- what a source is ---


@pytest.mark.parametrize("source", ["nowhere", "./no/such/folder", "models/sam_vit_b.pth", "a/b/c", "", "C:\\sam.pt"])
def test_missing_source(source):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_model(source)


def test_unreachable_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"owner/no-such-sam .*Hub failed: .*download the model and pass"):
        load_model("owner/no-such-sam")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("facebook/sam-vit-base", True), ("me/my_sam.v2", True), ("sam", False), ("a/b.pth", False), ("../a", False)],
)
def test_hub_id(name, expected):
    assert is_hub_id(name) is expected


# --- random models ---


def test_random_sam_is_deterministic_and_leaves_the_generator_alone():
    before = torch.random.get_rng_state()
    first, again, other = random_sam("nano", 256), random_sam("nano", 256), random_sam("nano", 256, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    differ = 0
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        differ += not torch.equal(parameter, other.get_parameter(name))
    assert differ > 100
    features = first.shared_image_embedding.positional_embedding
    assert first.prompt_encoder.shared_embedding.positional_embedding is features
    assert 0.8 < features.std() < 1.2
    assert not first.training and not any(p.requires_grad for p in first.parameters())
    masks = logits(first)
    assert masks.isfinite().all() and masks.std() > 1e-3


@pytest.mark.parametrize(
    ("size", "image_size", "message"), [("vit-x", 1024, "choose one of nano, vit-b"), ("vit-b", 1000, "multiple of 16")]
)
def test_random_sam_refuses(size, image_size, message):
    with pytest.raises(ConfigError, match=message):
        random_sam(size, image_size)
