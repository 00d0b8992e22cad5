"""The same code on a GPU. Skipped without one; none of the numbers in docs/RESULTS.md come from here."""

import pytest
import torch

import carsam

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_quantizing_on_the_gpu_agrees_with_the_cpu(nano, small_set, quick_config):
    on_cpu = carsam.quantize(nano, small_set, quick_config).model
    on_gpu = carsam.quantize(nano, small_set, quick_config, device="cuda").model
    image = small_set.images[0]
    with torch.no_grad():
        expected = on_cpu(pixel_values=image.pixel_values, input_boxes=image.boxes[None]).pred_masks
        inputs = {"pixel_values": image.pixel_values.cuda(), "input_boxes": image.boxes[None].cuda()}
        got = on_gpu(**inputs).pred_masks.cpu()
    # Rounding decisions near a tie fall differently and random numbers differ, so masks are compared, not bits.
    assert ((got > 0) == (expected > 0)).float().mean() > 0.95


def test_a_packed_folder_computes_the_same_on_both(packed_folder, small_set):
    image = small_set.images[0]
    outputs = []
    for device in ("cpu", "cuda"):
        model = carsam.load(packed_folder, device=device)
        inputs = {"pixel_values": image.pixel_values.to(device), "input_boxes": image.boxes[None].to(device)}
        with torch.no_grad():
            outputs.append(model(**inputs).pred_masks.cpu())
    assert ((outputs[0] > 0) == (outputs[1] > 0)).float().mean() > 0.98
