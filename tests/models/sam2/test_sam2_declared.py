"""What the ``config.json`` of a SAM 2 declares against its weights: refused at once, whatever the number."""

import copy
import json
import time

import pytest
from places import SAM2_NANO
from safetensors import safe_open
from transformers import Sam2Model, Sam2VideoConfig, Sam2VideoModel

from carsam.errors import CheckpointError
from carsam.models.sam2.declared import check_declared, too_large

CONFIG = json.loads((SAM2_NANO / "config.json").read_text())
BACKBONE, VISION, PROMPT, DECODER, MEMORY = (
    ("vision_config", "backbone_config"),
    ("vision_config",),
    *(
        ("prompt_encoder_config",),
        ("mask_decoder_config",),
        (),
    ),
)


@pytest.fixture(scope="module")
def shapes():
    with safe_open(SAM2_NANO / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}


def declared(path, **changes):
    config = copy.deepcopy(CONFIG)
    part = config
    for name in path:
        part = part[name]
    part.update(changes)
    return config


def refused(shapes, config, message=""):
    started = time.process_time()
    with pytest.raises(CheckpointError, match=rf"config\.json of X .*{message}"):
        check_declared(Sam2VideoModel, config, shapes, "X")
    assert time.process_time() - started < 1


def test_the_embedded_models_own_is_fine(shapes):
    check_declared(Sam2VideoModel, CONFIG, shapes, "X")
    # transformers' image model loads the same folder.
    check_declared(Sam2Model, CONFIG | {"model_type": "sam2"}, shapes, "X")
    assert too_large(Sam2VideoConfig.from_dict(CONFIG), ["vision_encoder.backbone.blocks.0.attn.qkv"]) != ""


NUMBERS = [
    (BACKBONE, "hidden_size"),
    (BACKBONE, "num_channels"),
    (VISION, "fpn_hidden_size"),
    (PROMPT, "hidden_size"),
    (PROMPT, "image_size"),
    (PROMPT, "patch_size"),
    (PROMPT, "num_point_embeddings"),
    (PROMPT, "mask_input_channels"),
    *((DECODER, name) for name in ("hidden_size", "mlp_dim", "num_hidden_layers", "attention_downsample_rate")),
    *((DECODER, name) for name in ("num_multimask_outputs", "iou_head_depth", "iou_head_hidden_dim")),
    *((MEMORY, name) for name in ("image_size", "num_maskmem", "memory_attention_num_layers")),
    *((MEMORY, name) for name in ("memory_attention_feed_forward_hidden_size", "memory_fuser_num_layers")),
    *((MEMORY, name) for name in ("memory_encoder_output_channels", "mask_downsampler_embed_dim")),
]


@pytest.mark.parametrize(("path", "name"), NUMBERS, ids=[name for _, name in NUMBERS])
@pytest.mark.parametrize("value", [10**9, 2**40, -1, 12.5, float("nan"), "768", True, [1, 2, 3]], ids=str)
def test_a_number_that_makes_no_model_is_refused_at_once(shapes, path, name, value):
    refused(shapes, declared(path, **{name: value}))


LISTS = {
    "a million blocks": (BACKBONE, {"blocks_per_stage": [1, 2, 10**6, 1]}, "whole numbers from 1 to 32768"),
    "2003 blocks": (BACKBONE, {"blocks_per_stage": [1, 2, 2000, 1]}, "it has 2004 blocks"),
    "a million stages": (BACKBONE, {"blocks_per_stage": [1] * 10**6}, "blocks_per_stage"),
    "no list": (BACKBONE, {"embed_dim_per_stage": 40}, "embed_dim_per_stage"),
    "zero": (BACKBONE, {"num_attention_heads_per_stage": [1, 2, 0, 6]}, "num_attention_heads_per_stage"),
    "other heads": (BACKBONE, {"num_attention_heads_per_stage": [3, 2, 4, 6]}, "3 heads do not divide the width 40"),
    "other lengths": (BACKBONE, {"window_size_per_stage": [8, 4]}, "not of one length"),
    "other widths": (BACKBONE, {"embed_dim_per_stage": [40, 80, 160, 320]}, "backbone_channel_list"),
    "one block more": (
        BACKBONE,
        {"blocks_per_stage": [1, 2, 7, 1]},
        "the number of blocks is 11, but its weights have 10",
    ),
    "huge windows": (BACKBONE, {"window_size_per_stage": [8, 4, 8, 3000]}, "larger than the image"),
    "huge patches": (BACKBONE, {"patch_kernel_size": [10**6, 7]}, "patch_kernel_size"),
    "global blocks": (BACKBONE, {"global_attention_blocks": ["a"]}, "global_attention_blocks"),
    "other sizes": (VISION, {"backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]}, "backbone_feature_sizes"),
    "other input": (PROMPT, {"image_size": 512}, "backbone_feature_sizes"),
    "other input of the memory": (MEMORY, {"image_size": 512}, "they must be the same"),
    "oblong": (PROMPT, {"image_size": [256, 512]}, "must be a square"),
    "wider": (DECODER, {"mlp_dim": 1024}, r"makes mask_decoder\.transformer.* but its weights have"),
    "no vision": ((), {"vision_config": None}, "backbone_feature_sizes .* are not those of an input of 256"),
    "vision is a number": ((), {"vision_config": 3}, "vision_config is '3', not a mapping"),
    "no backbone": (VISION, {"backbone_config": None}, "backbone_channel_list"),
    "a list": ((), {"mask_decoder_config": [1]}, "mask_decoder_config is '\\[1\\]', not a mapping"),
}


@pytest.mark.parametrize(("path", "changes", "message"), LISTS.values(), ids=LISTS)
def test_what_does_not_fit_is_named(shapes, path, changes, message):
    refused(shapes, declared(path, **changes), message)


def test_weights_that_lack_a_layer_are_said(shapes):
    cut = {name: shape for name, shape in shapes.items() if not name.startswith("memory_attention.layers.3.")}
    refused(cut, CONFIG, "memory_attention_num_layers is 4, but its weights have 3")
