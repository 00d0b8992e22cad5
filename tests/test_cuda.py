"""The same code on a GPU. Skipped without one; none of the numbers in docs/RESULTS.md come from here."""

import pytest
import torch

import carsam
from carsam.config import QuantizeConfig
from carsam.methods.base import create, registry
from carsam.quantizers import SiteQuantizer

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


@pytest.mark.parametrize("name", sorted(registry()))
def test_every_method_and_its_grids_run_on_the_gpu(name, nano, small_set):
    steps = {"reconstruction": {"steps": 5, "decoder_steps": 5}} if hasattr(create(name), "reconstruction") else {}
    config = QuantizeConfig(method=name, settings=steps, decoder_only=True)
    image, masks = small_set.images[0], []
    for device in ("cpu", "cuda"):
        model = carsam.quantize(nano, small_set, config, device=device).model.to(device)
        inputs = {"pixel_values": image.pixel_values.to(device), "input_boxes": image.boxes[None].to(device)}
        with torch.no_grad():
            masks.append(model(**inputs).pred_masks.cpu() > 0)
        for quantizer in model.modules():
            if isinstance(quantizer, SiteQuantizer) and quantizer.bits < 16:
                # A channel each: what is asked for is where it is computed.
                channels = next(
                    (getattr(quantizer, name) for name in ("group", "shift") if hasattr(quantizer, name)), None
                )
                x = torch.rand(3, 5 if channels is None else channels.numel(), device=device)
                codes = quantizer.encode(x)
                assert codes.device == x.device
                rounded = quantizer.round(x, quantizer.step_along(x))
                torch.testing.assert_close(quantizer.decode(codes), rounded, rtol=1e-4, atol=1e-5)
    assert (masks[0] == masks[1]).float().mean() > 0.9


def test_a_packed_folder_computes_the_same_on_both(packed_folder, small_set):
    image = small_set.images[0]
    outputs = []
    for device in ("cpu", "cuda"):
        model = carsam.load(packed_folder, device=device)
        inputs = {"pixel_values": image.pixel_values.to(device), "input_boxes": image.boxes[None].to(device)}
        with torch.no_grad():
            outputs.append(model(**inputs).pred_masks.cpu())
    assert ((outputs[0] > 0) == (outputs[1] > 0)).float().mean() > 0.98


def test_car_sam_plus_chooses_and_refits_on_the_gpu(nano, small_set):
    """Foldings, ranges and the refit compute where the model is; masks agree with the CPU's."""
    settings = {"learn": False, "weight_observer": "min-max", "equivalences": {"rotation": True}}
    config = carsam.QuantizeConfig("car-sam-plus", settings)
    image, masks = small_set.images[0], []
    for device in ("cpu", "cuda"):
        model = carsam.quantize(nano, small_set, config, device=device).model
        inputs = {"pixel_values": image.pixel_values.to(device), "input_boxes": image.boxes[None].to(device)}
        with torch.no_grad():
            masks.append(model(**inputs).pred_masks.cpu() > 0)
    # A choice near a tie may fall differently, and then whole attentions have another grid.
    assert (masks[0] == masks[1]).float().mean() > 0.9
