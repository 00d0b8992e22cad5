"""Hiera's sites, the windows that it pads, and attentions over a whole image in pieces."""

import copy

import numpy as np
import pytest
import torch
from places import SAM2_NANO
from torch import nn
from transformers import Sam2Model, Sam2VideoModel
from transformers.models.sam2.modeling_sam2 import window_partition

import carsam
from carsam.data.images.transforms import Preprocessor, preprocessor_config
from carsam.errors import CheckpointError, ConfigError
from carsam.models.attention import MatMulQuantizers
from carsam.models.family import family_of, find_sites
from carsam.models.forward import encode_image, predict_logits
from carsam.models.load import load_model
from carsam.models.sam2.encoder import valid_queries
from carsam.models.sam2.random import random_sam2, sam2_config
from carsam.models.skeleton import skeleton
from carsam.quantizers import ActivationQuantizer, UniformSoftmax
from carsam.run.embeddings import encoder_fingerprint


@pytest.fixture(scope="module")
def model():
    return random_sam2("nano", 192)


def test_sites_are_every_layer_of_hiera_neck_and_transformer(model):
    sites = find_sites(model)
    inside = ("vision_encoder.backbone.blocks", "vision_encoder.neck", "mask_decoder.transformer")
    expected = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name.startswith(inside)
    }
    assert {site.name for site in sites.layers} == expected
    floating = {site.name for site in sites.floating}
    # Transposed convolutions and the prompt encoder's are no sites of either kind.
    others = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))} - expected
    assert others - floating == {f"prompt_encoder.mask_embed.conv{i}" for i in (1, 2, 3)}
    assert floating >= {"mask_decoder.conv_s0", "mask_decoder.pred_obj_score_head.proj_in"} and floating <= others


def test_pooled_attentions_and_their_norms(model):
    sites = find_sites(model)
    pooled = {site.name for site in sites.attentions if site.pooled}
    assert pooled == {f"vision_encoder.backbone.blocks.{i}.attn" for i in (1, 2, 4)}
    # The norm before a change of width is read by two layers, so its channels may not be scaled for one of them.
    read = [norm for norm, _ in sites.readers]
    assert not any(f"vision_encoder.backbone.blocks.{i}.layer_norm1" in read for i in (1, 2, 4))
    assert len(read) == 2 * 5 - 3


@pytest.mark.parametrize("grid", [48, 20])
@pytest.mark.parametrize("index", range(5))
@torch.no_grad()
def test_padded_windows_are_known(model, index, grid):
    """By transformers' own partition of a grid of ones, pooled as the block pools: 8, 6 and 4 divide 48, not all 20."""
    block = model.vision_encoder.backbone.blocks[index]
    found = valid_queries(block, grid, grid)
    if not block.window_size:
        assert found is None
        return
    windows, _ = window_partition(torch.ones(1, grid, grid, 1), block.window_size)
    if block.query_stride:
        windows = nn.functional.max_pool2d(windows.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    assert torch.equal(found, windows.flatten(1) > 0)
    assert bool(found.all()) == (grid % block.window_size == 0)


@pytest.mark.parametrize(("side", "padded"), [(192, []), (128, [4])])
def test_projections_that_read_padding(side, padded):
    """Windows of 6 divide the grid of 12 of an input of 192 pixels, not the 8 of 128."""
    expected = tuple(f"vision_encoder.backbone.blocks.{index}.attn.qkv" for index in padded)
    assert find_sites(random_sam2("nano", side)).padded == expected


@torch.no_grad()
def test_attentions_in_pieces_are_the_whole(model, monkeypatch):
    changed = copy.deepcopy(model)
    family = family_of(model)
    for site in find_sites(changed).attentions:
        matmul = MatMulQuantizers(*(ActivationQuantizer(16) for _ in range(3)), UniformSoftmax(16))
        family.with_matmul(changed.get_submodule(site.name), matmul)
    pixels = torch.randn(1, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    whole = encode_image(changed, pixels)
    for elements in (100, 10_000):
        monkeypatch.setattr("carsam.models.attention.CHUNK_ELEMENTS", elements)
        torch.testing.assert_close(encode_image(changed, pixels), whole)
    torch.testing.assert_close(encode_image(model, pixels), whole, atol=1e-5, rtol=1e-4)


def test_embeddings_hang_on_the_encoder_alone(model):
    fingerprint = encoder_fingerprint(model)
    for name, kept in (("mask_decoder.iou_token.weight", True), ("mask_decoder.conv_s0.bias", False)):
        changed = copy.deepcopy(model)
        changed.get_parameter(name).data += 1
        assert (encoder_fingerprint(changed) == fingerprint) == kept


# --- the embedded model ---


@pytest.fixture(scope="module")
def embedded():
    return load_model(SAM2_NANO)


@torch.no_grad()
def test_both_classes_give_the_same_masks(embedded, tmp_path):
    """The folder is a video model's; its image model, saved, is one of carsam's too."""
    assert type(embedded) is Sam2VideoModel and embedded.dtype == torch.float32
    Sam2Model.from_pretrained(SAM2_NANO, dtype=torch.float32).save_pretrained(tmp_path)
    image = load_model(tmp_path)
    assert type(image) is Sam2Model
    pixels = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[20.0, 30, 200, 220]])
    masks = [predict_logits(each, encode_image(each, pixels), boxes=boxes) for each in (embedded, image)]
    for one, other in zip(*masks):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)  # two copies of one code, in float32


def test_images_are_stretched(embedded):
    """An oblong image fills the frame, and masks come back in one step."""
    preprocessor = Preprocessor.for_model(embedded)
    pixels, geometry = preprocessor(np.full((60, 120, 3), 200, dtype=np.uint8))
    assert pixels.shape == (1, 3, 256, 256) and bool((pixels[0, 0] == pixels[0, 0, 0, 0]).all())
    assert geometry.boxes_to_input(np.array([0, 0, 120, 60])).tolist() == [0, 0, 256, 256]
    low_res = torch.randn(1, 1, 64, 64)
    own = nn.functional.interpolate(low_res, (60, 120), mode="bilinear", align_corners=False)
    assert torch.equal(geometry.masks_to_original(low_res, 256), own)
    settings = preprocessor_config(embedded)
    assert settings["image_processor_type"] == "Sam2ImageProcessor" and settings["size"] == {
        "height": 256,
        "width": 256,
    }


def test_predictor_takes_an_oblong_image(embedded):
    predictor = carsam.SamPredictor(embedded)
    predictor.set_image(np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8))
    masks, scores, low_res = predictor.predict(box=np.array([10, 10, 90, 50]))
    assert masks.shape == (3, 60, 100) and scores.shape == (3,) and low_res.shape == (3, 64, 64)
    again, _, _ = predictor.predict(box=np.array([10, 10, 90, 50]), mask_input=low_res[:1], multimask_output=False)
    assert again.shape == (1, 60, 100)
    assert predictor.predict(box=np.zeros((0, 4)))[0].shape == (0, 60, 100)
    points, labels = np.array([[50, 30], [10, 10]]), np.array([1, 0])
    assert predictor.predict(points, labels, multimask_output=False)[0].shape == (1, 60, 100)
    with pytest.raises(CheckpointError, match="no segment_anything form"):
        carsam.as_segment_anything(embedded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "huge"}, "unknown SAM 2 size 'huge'"),
        ({"image_size": 100}, "multiple of 64"),
        ({"version": "3"}, "2.1"),
    ],
)
def test_impossible_models_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        sam2_config(**{"size": "tiny", "video": True, **arguments})


@pytest.mark.parametrize(
    ("size", "parameters"), [("tiny", 38.9), ("small", 46.0), ("base-plus", 80.8), ("large", 224.4)]
)
def test_sizes_are_the_published_ones(size, parameters):
    """Millions of parameters as Meta's table has them (SAM 2.1)."""

    model = skeleton(Sam2VideoModel, sam2_config(size, video=True))
    assert round(model.num_parameters() / 1e6, 1) == pytest.approx(parameters, abs=0.11)
