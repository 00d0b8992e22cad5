"""SAM's input frame."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import NANO
from transformers import SamModel
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from carsam.data.images.transforms import Geometry, Preprocessor, preprocessor_config, resized_size

sides = st.integers(1, 4000)


@pytest.fixture(scope="module")
def model():
    return SamModel.from_pretrained(NANO, dtype=torch.float32, attn_implementation="eager")


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(sides, sides)
def test_resized_size(height, width):
    new = resized_size((height, width), 1024)
    assert max(new) == 1024 and min(new) >= 1
    for old, side in zip((height, width), new):
        assert side == 1 or abs(side - old * 1024 / max(height, width)) <= 0.5 + 1e-6


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (256, 256), (300, 700), (1, 500), (3, 3)])
def test_preprocess(size):
    pixels, geometry = Preprocessor(256)(picture(*size))
    height, width = geometry.input_size
    assert pixels.shape == (1, 3, 256, 256) and pixels.dtype == torch.float32
    assert geometry.original_size == size and max(height, width) == 256
    assert not pixels[..., height:, :].any() and not pixels[..., width:].any()


def test_normalisation_by_hand():
    image = np.full((256, 256, 3), (10, 100, 250), dtype=np.uint8)
    pixels, _ = Preprocessor(256)(image)
    expected = [(10 - 123.675) / 58.395, (100 - 116.28) / 57.12, (250 - 103.53) / 57.375]
    assert pixels[0, :, 5, 5].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_preprocess_refuses_other_arrays(image):
    with pytest.raises(ValueError, match="uint8 RGB"):
        Preprocessor(256)(image)


@settings(deadline=None)
@given(sides, sides, st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5))
def test_points_round_trip(height, width, relative):
    geometry = Geometry((height, width), resized_size((height, width), 1024))
    points = np.array(relative) * [width, height]
    there = geometry.points_to_input(points)
    assert (there >= 0).all() and (there <= np.array(geometry.input_size)[::-1] + 1e-6).all()
    back = Geometry(geometry.input_size, geometry.original_size).points_to_input(there)
    assert np.allclose(back, points, atol=1e-6)
    assert np.allclose(geometry.points_to_input(torch.from_numpy(points)).numpy(), there, rtol=1e-5, atol=1e-3)


def test_boxes_are_two_points():
    geometry = Geometry((100, 200), (128, 256))
    boxes = np.array([[10, 20, 30, 40], [0, 0, 200, 100]])
    assert geometry.boxes_to_input(boxes).tolist() == [[12.8, 25.6, 38.4, 51.2], [0, 0, 256, 128]]
    tensor = geometry.boxes_to_input(torch.from_numpy(boxes))
    assert tensor.dtype == torch.float32 and tensor.shape == (2, 4)


def test_masks_to_original_crops_the_padding():
    # Positive over the image, negative over the padding below it.
    low_res = torch.full((2, 1, 64, 64), -8.0)
    low_res[..., :32, :] = 8.0
    geometry = Geometry((100, 200), (128, 256))
    masks = geometry.masks_to_original(low_res, 256)
    assert masks.shape == (2, 1, 100, 200)
    assert (masks[..., :98, :] > 0).all()
    assert geometry.masks_to_original(low_res[0, 0].half(), 256).shape == (100, 200)


@pytest.mark.parametrize("size", [(171, 256), (97, 310), (400, 123)])
def test_config_gives_the_same_through_transformers(model, tmp_path, size):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(model)))
    processor = SamImageProcessorPil.from_pretrained(tmp_path)
    image = picture(*size)
    theirs = processor(image, return_tensors="pt")
    ours, geometry = Preprocessor.for_model(model)(image)
    assert theirs["pixel_values"].shape == ours.shape
    assert (theirs["pixel_values"] - ours).abs().max() < 1e-4
    assert theirs["reshaped_input_sizes"][0].tolist() == list(geometry.input_size)
    logits = torch.randn(1, 1, 1, 64, 64)
    masks = processor.post_process_masks(
        logits,
        theirs["original_sizes"],
        theirs["reshaped_input_sizes"],
        binarize=False,
        pad_size={"height": 256, "width": 256},
    )
    assert torch.allclose(masks[0], geometry.masks_to_original(logits[0], 256), atol=1e-5)
