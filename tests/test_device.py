"""The one rule for devices: what is asked for, and is there."""

import pytest
import torch

from carsam.device import resolve_device
from carsam.errors import DeviceError
from carsam.models.load import load_model


@pytest.mark.parametrize("request_", ["cpu", torch.device("cpu")])
def test_cpu(request_):
    assert resolve_device(request_) == torch.device("cpu")


@pytest.mark.parametrize(("gpu", "expected"), [(False, "cpu"), (True, "cuda")])
def test_auto(monkeypatch, gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert resolve_device("auto").type == expected


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda", 0, "not available: this PyTorch .*Use cpu or auto"),
        ("cuda:3", 2, "GPUs here are cuda:0 to cuda:1"),
        ("gpu", 0, "is not a device"),
        ("meta", 0, "not available here"),
    ],
)
def test_device_that_is_not_there(monkeypatch, device, gpus, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(DeviceError, match=message):
        resolve_device(device)


def test_model_is_not_read_for_a_device_that_is_not_there():
    with pytest.raises(DeviceError, match="is not a device"):
        load_model("no-such-model", device="gpu")
