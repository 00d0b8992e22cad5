"""A packed folder loaded to run on integers; kernels by their references where there is no GPU."""

import pytest
import torch

import carsam
from carsam.errors import ConfigError, DeviceError
from carsam.models.family import family_of
from carsam.runtime.cuda import run_on_integers
from carsam.runtime.linear import IntegerLinear

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def masks(model, image, device="cpu"):
    with torch.no_grad():
        inputs = {"pixel_values": image.pixel_values.to(device), "input_boxes": image.boxes[None].to(device)}
        return model(**inputs).pred_masks.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_those_of_the_simulated_model(packed_folder, small_set, dtype):
    image = small_set.images[0]
    expected = masks(carsam.load(packed_folder), image)
    model = carsam.load(packed_folder)
    done = run_on_integers(model, dtype=dtype, compiled=False)
    assert done.linears > 50 and done.modules["QuantizedRelativeAttention"] == done.modules["IntegerMlp"] == 8
    assert set(done.simulated) == {"it is a convolution"}
    embeddings = family_of(model).encode_image(model, image.pixel_values)
    assert embeddings.dtype == torch.float32
    agree = ((masks(model, image) > 0) == (expected > 0)).float().mean()
    # bfloat16 moves a value of 4 bits over the edge of its step now and then.
    assert agree > (0.99 if dtype == torch.float32 else 0.95)


def test_a_wrong_runtime_is_an_error(packed_folder):
    with pytest.raises(ConfigError, match="choose from torch, onnx, cuda"):
        carsam.load(packed_folder, runtime="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="device cuda is not available"):
            carsam.load(packed_folder, runtime="cuda")


@on_gpu
def test_on_a_gpu(packed_folder, small_set):
    image = small_set.images[0]
    expected = masks(carsam.load(packed_folder), image)
    model = carsam.load(packed_folder, runtime="cuda")
    assert any(isinstance(module, IntegerLinear) for module in model.modules())
    assert ((masks(model, image, "cuda") > 0) == (expected > 0)).float().mean() > 0.95
