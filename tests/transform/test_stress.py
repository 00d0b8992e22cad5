"""The stressed twin computes the same, and is stressed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import carsam
from carsam.errors import ConfigError
from carsam.transform.stress import stress


@settings(max_examples=4, deadline=None)
@given(st.floats(0.1, 2.0), st.integers(0, 1000))
@torch.no_grad()
def test_float_outputs_are_equal(nano, nano_folder, strength, seed):
    twin = stress(carsam.load_model(nano_folder), strength, seed)
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "pixel_values": torch.randn(1, 3, 256, 256, generator=generator),
        "input_boxes": torch.tensor([[[20.0, 30.0, 120.0, 140.0], [5.0, 5.0, 250.0, 200.0]]]),
    }
    expected, got = nano(**inputs), twin(**inputs)
    # Logits reach ±20; key offsets of 16 cost float32 a few digits of the scores.
    torch.testing.assert_close(got.pred_masks, expected.pred_masks, atol=2e-2, rtol=1e-3)
    torch.testing.assert_close(got.iou_scores, expected.iou_scores, atol=1e-3, rtol=1e-3)


def test_keys_become_bimodal_and_strength_zero_changes_nothing(nano, nano_folder):
    same = stress(carsam.load_model(nano_folder), 0.0)
    for name, value in same.state_dict().items():
        torch.testing.assert_close(value, nano.state_dict()[name])
    twin = stress(carsam.load_model(nano_folder), 1.0)
    name = "mask_decoder.transformer.layers.0.cross_attn_token_to_image.k_proj.bias"
    moved = twin.state_dict()[name] - nano.state_dict()[name]
    assert (moved.abs() > 1.5).all() and (moved > 0).any() and (moved < 0).any()
    with pytest.raises(ConfigError):
        stress(twin, -1.0)
