"""Declared sizes against the weights: refused at once, by name, whatever the number."""

import copy
import json
import time

import pytest
from places import NANO
from safetensors import safe_open

from carsam.errors import CheckpointError
from carsam.models.sam.declared import check_declared, contiguous_count, numbered

CONFIG = json.loads((NANO / "config.json").read_text())
VISION, PROMPT, DECODER = "vision_config", "prompt_encoder_config", "mask_decoder_config"


@pytest.fixture(scope="module")
def shapes():
    with safe_open(NANO / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}


def declared(part, **changes):
    config = copy.deepcopy(CONFIG)
    config[part].update(changes)
    return config


SIZES = [
    *((VISION, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size")),
    *((VISION, name) for name in ("patch_size", "mlp_dim", "window_size", "output_channels", "num_pos_feats")),
    *((PROMPT, name) for name in ("hidden_size", "image_size", "num_point_embeddings", "mask_input_channels")),
    (PROMPT, "image_embedding_size"),
    *((DECODER, name) for name in ("hidden_size", "mlp_dim", "num_hidden_layers", "attention_downsample_rate")),
    *((DECODER, name) for name in ("num_multimask_outputs", "iou_head_depth", "iou_head_hidden_dim")),
]


@pytest.mark.parametrize(("part", "name"), SIZES)
@pytest.mark.parametrize("value", [10**9, 10**6, -1, 2**40, float("nan"), float("inf"), 12.0, "768", [64], True])
def test_a_declared_size_is_refused_at_once_and_named(shapes, part, name, value):
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"config\.json of X .*" + name):
        check_declared(declared(part, **{name: value}), shapes, "X")
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        *(
            (part, "layer_norm_eps", value)
            for part in (VISION, PROMPT, DECODER)
            for value in (float("nan"), -1e-6, 5.0)
        ),
        (VISION, "global_attn_indexes", [10**9]),
        (VISION, "attention_dropout", float("nan")),
        (DECODER, "num_attention_heads", 7),
        (VISION, "num_channels", 1),
        (VISION, "mlp_ratio", "much"),
        (VISION, "hidden_act", "no such function"),
        (VISION, "qkv_bias", "yes"),
        (VISION, "dtype", 1e300),
    ],
)
def test_other_settings(shapes, part, name, value):
    with pytest.raises(CheckpointError, match=r"config\.json of X "):
        check_declared(declared(part, **{name: value}), shapes, "X")


def test_the_message_says_both_numbers_and_the_tensor(shapes):
    with pytest.raises(CheckpointError, match=r"hidden_size is 1000000000, .* have 192 \(vision_encoder\.layers\.0\."):
        check_declared(declared(VISION, hidden_size=10**9), shapes, "X")


@pytest.mark.parametrize("part", [VISION, PROMPT, DECODER])
@pytest.mark.parametrize("value", [[], "text", 3])
def test_a_part_that_is_no_mapping(shapes, part, value):
    with pytest.raises(CheckpointError, match=f"{part} is .*not a mapping"):
        check_declared({**CONFIG, part: value}, shapes, "X")


def test_sizes_that_no_tensor_shows_are_bounded(shapes):
    """Without position embeddings nothing confirms the input's side or the window."""
    bare = {name: shape for name, shape in shapes.items() if "pos_embed" not in name and "rel_pos" not in name}
    off = {"use_abs_pos": False, "use_rel_pos": False}
    config = declared(VISION, **off)
    check_declared(config, bare, "X")
    config[VISION]["window_size"] = 10**6
    with pytest.raises(CheckpointError, match="window_size is 1000000, on a grid of 16"):
        check_declared(config, bare, "X")
    config = declared(VISION, **off, image_size=2**20)
    config[PROMPT].update(image_size=2**20, image_embedding_size=2**16)
    with pytest.raises(CheckpointError, match="no tensor of its weights confirms it"):
        check_declared(config, bare, "X")


def test_weights_that_lack_what_shows_the_sizes(shapes):
    few = {name: shape for name, shape in shapes.items() if "layer_norm" in name or "bias" in name or ".mlps" in name}
    few |= {name: (1, 1) for name in shapes if "hypernetworks" in name or "point_embed" in name}
    few = {name: shape for name, shape in few.items() if "vision_encoder" not in name or ".attn.qkv" in name}
    with pytest.raises(CheckpointError, match=r"declares a model of [\d,]+ weights, but its weights hold [\d,]+ num"):
        check_declared(declared(VISION, hidden_size=19200), few, "X")


def test_an_empty_tensor_backs_nothing(shapes):
    with pytest.raises(CheckpointError, match=r"mask_decoder\.mask_tokens\.weight is empty"):
        check_declared(CONFIG, {**shapes, "mask_decoder.mask_tokens.weight": (10**9, 0)}, "X")


def test_the_embedded_model_and_a_packed_one_pass(shapes):
    check_declared(CONFIG, shapes, "X")
    names = (
        "attn.qkv.weight",
        "attn.proj.weight",
        "mlp.lin1.weight",
        "mlp.lin2.weight",
        "_proj.weight",
        "conv1.weight",
    )
    packed = {}
    for name, shape in shapes.items():
        elements = 1
        for side in shape:
            elements *= side
        packed[name] = ((elements + 3) // 4,) if name.endswith(names) and "embed" not in name else shape  # 2 bits each
    check_declared(CONFIG, packed, "X", weights_per_element=8)


def test_counting_stops_at_the_first_gap():
    assert contiguous_count([0, 1, 2, 3_000_000]) == 3
    assert contiguous_count([1, 2]) == 0
    names = ["a.0.w", "a.1.w", "a.3000000.w", f"a.{'9' * 5000}.w", "b.2.w"]
    assert numbered(names, r"a\.(\d+)\.") == 2
