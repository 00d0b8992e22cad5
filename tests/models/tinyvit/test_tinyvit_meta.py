"""Published checkpoints: what is read from shapes, how batch norms are folded, and what a bad file says."""

import pytest
import torch
from tinyvit_state import SIDES, SMALL, published_state
from torch.nn import functional as F

from carsam.data.images.normalisation import IMAGENET, STRETCHED, UNIT, normalisation_of
from carsam.errors import CheckpointError, ConfigError
from carsam.models.files.state import find_state
from carsam.models.tinyvit.meta import (
    ANCHOR,
    fold_batch_norm,
    heads_apart,
    infer_tinyvit_config,
    tinyvit_from_meta,
)
from carsam.models.tinyvit.random import tinyvit_config

KINDS = ["mobilesam", "litemedsam"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_architecture_follows_from_shapes(kind):
    config = infer_tinyvit_config(published_state(kind), image_size=SIDES[kind])
    assert config.to_dict() == tinyvit_config(kind, SIDES[kind], **SMALL).to_dict()


@pytest.mark.parametrize(("kind", "side", "cells"), [("mobilesam", 1024, 64), ("litemedsam", 256, 64)])
def test_the_resolution_follows_from_the_patch_embedding(kind, side, cells):
    config = infer_tinyvit_config(published_state(kind))
    assert config.vision_config.image_size == config.prompt_encoder_config.image_size == side
    assert config.prompt_encoder_config.image_embedding_size == cells


@pytest.mark.parametrize(
    ("kind", "size", "step"),
    [("mobilesam", 100, 16), ("mobilesam", 0, 16), ("litemedsam", 30, 4), ("litemedsam", -4, 4)],
)
def test_an_image_size_that_makes_no_whole_cells_is_refused(kind, size, step):
    with pytest.raises(ConfigError, match=rf"image_size is {size}; .* positive multiple of {step} "):
        tinyvit_from_meta(published_state(kind), image_size=size)


def test_folding_equals_convolution_and_norm():
    state, path = published_state(), "image_encoder.layers.0.downsample.conv2"
    parts = [state[f"{path}.bn.{part}"] for part in ("weight", "bias", "running_mean", "running_var")]
    weight = state[f"{path}.c.weight"]
    maps = torch.randn(2, len(weight), 9, 9, generator=torch.Generator().manual_seed(1))
    options = {"stride": 2, "padding": 1, "groups": len(weight)}
    gamma, beta, mean, variance = parts
    expected = F.batch_norm(F.conv2d(maps, weight, **options), mean, variance, gamma, beta, eps=1e-5)
    actual = F.conv2d(maps, *fold_batch_norm(weight, *parts), **options)
    assert (actual - expected).abs().max() < 1e-5
    loaded = tinyvit_from_meta(state, image_size=128).vision_encoder.layers[1].conv2
    assert torch.equal(F.conv2d(maps, loaded.weight, loaded.bias, **options), actual)


def test_heads_are_taken_apart():
    # Two heads of three channels: the file has q0 k0 v0 q1 k1 v1.
    rows = torch.arange(18).reshape(2, 3, 3)
    expected = torch.cat([rows[:, part].reshape(-1) for part in range(3)])
    assert torch.equal(heads_apart(rows.reshape(-1), 2), expected)
    assert torch.equal(heads_apart(rows.reshape(18, 1), 2), expected[:, None])


def test_leftovers_of_classification_change_nothing():
    state = published_state()
    extra = ("image_encoder.head", "image_encoder.norm_head", "num_batches_tracked", "attention_bias_idxs")
    bare = {name: tensor for name, tensor in state.items() if not any(part in name for part in extra)}
    assert len(state) - len(bare) == 4 + 18 + 4  # classifier, norms, attentions
    whole, stripped = (tinyvit_from_meta(s, image_size=128).state_dict() for s in (state, bare))
    assert all(torch.equal(whole[name], stripped[name]) for name in whole)


@pytest.mark.parametrize(("kind", "expected"), [("mobilesam", IMAGENET), ("litemedsam", STRETCHED)])
def test_pixels_are_normalised_as_published(kind, expected):
    assert normalisation_of(tinyvit_from_meta(published_state(kind), image_size=SIDES[kind])) == expected


def test_buffers_of_the_file_come_before_the_published_normalisation():
    state = published_state("litemedsam") | {"pixel_mean": torch.zeros(3), "pixel_std": torch.full((3, 1, 1), 255.0)}
    assert normalisation_of(tinyvit_from_meta(state, image_size=32)) == UNIT


def test_half_precision_weights_are_folded_in_double():
    half = {k: v.half() if v.is_floating_point() else v for k, v in published_state().items()}
    again = {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
    first, second = (tinyvit_from_meta(state, image_size=128).state_dict() for state in (half, again))
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == torch.float32 for name in first)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "sam.model."])
def test_wrapped_and_prefixed_state_dicts_are_found(wrap, prefix):
    state = published_state()
    content = wrap({prefix + name: tensor for name, tensor in state.items()})
    assert find_state(content, ANCHOR, "file.pt").keys() == state.keys()


def test_other_content_is_not_of_this_family(nano):
    assert find_state({"model": nano.state_dict()}, ANCHOR, "file.pt") is None
    assert find_state({"image_encoder.patch_embed.proj.weight": torch.ones(1)}, ANCHOR, "file.pt") is None


def without(*names):
    return lambda state: [state.pop(name) for name in names]


def replaced(name, tensor):
    return lambda state: state.update({name: tensor})


BLOCK = "image_encoder.layers.1.blocks.0"
DAMAGE = [
    (without(f"{BLOCK}.mlp.fc2.bias"), r"mlp\.fc2\.bias missing"),
    (without(f"{BLOCK}.local_conv.bn.running_var"), r"local_conv\.bn\.running_var missing"),
    (without(f"{BLOCK}.attn.attention_biases"), r"attention_biases is missing"),
    (without("mask_decoder.iou_token.weight"), r"mask_decoder\.iou_token\.weight is missing"),
    (without("image_encoder.neck.3.bias"), r"neck\.3\.bias missing"),
    (
        replaced(f"{BLOCK}.extra", torch.ones(1)),
        r"tensors that MobileSAM does not: image_encoder\.layers\.1\.blocks\.0\.e",
    ),
    (replaced("image_encoder.layers.0.blocks.0.lora_a.weight", torch.ones(1)), "adapters"),
    (replaced(f"{BLOCK}.mlp.fc2.bias", torch.ones(3)), r"mlp\.fc2\.bias \(3,\) instead of \(16,\)"),
    (replaced(f"{BLOCK}.local_conv.bn.bias", torch.ones(3)), r"local_conv\.bn\.bias \(3,\) instead of \(16,\)"),
    (replaced(f"{BLOCK}.mlp.fc2.bias", torch.ones(16, dtype=torch.int8)), r"mlp\.fc2\.bias in torch\.int8"),
    (replaced(f"{BLOCK}.attn.attention_biases", torch.ones(2, 48)), "48 distances, which no square window has"),
    (replaced(f"{BLOCK}.attn.attention_biases", torch.ones(3, 49)), "3 heads do not divide a stage's width 16"),
    (replaced(f"{BLOCK}.attn.attention_biases", torch.ones(0, 49)), "attention_biases is empty"),
    (replaced("image_encoder.patch_embed.seq.0.c.weight", torch.ones(4, 3, 5, 5)), "kernels of 5 × 5"),
    (replaced("mask_decoder.iou_token.weight", torch.ones(0, 256)), "iou_token.weight is empty"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_named(damage, message):
    state = published_state()
    damage(state)
    with pytest.raises(CheckpointError, match=rf"file\.pt.*{message}"):
        tinyvit_from_meta(state, "file.pt", image_size=128)


def test_a_missing_stage_is_named():
    state = {k: v for k, v in published_state().items() if not k.startswith("image_encoder.layers.2.blocks")}
    with pytest.raises(CheckpointError, match=r"4 stages .*\[1, 1, 0, 1\] blocks; .* Use the complete file"):
        tinyvit_from_meta(state, "file.pt")


def test_the_model_owns_its_memory():
    state = published_state()
    model = tinyvit_from_meta(state, image_size=128)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in state.values():
        tensor.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
