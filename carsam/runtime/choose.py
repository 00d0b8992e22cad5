"""Where a model computes: in torch, on ONNX Runtime, or on a GPU's integer units."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from carsam.device import resolve_device
from carsam.errors import ConfigError, DeviceError
from carsam.models.forward import run_in, runs_in

RUNTIMES = ("torch", "onnx", "cuda")


def device_for(runtime: str, device: str | torch.device) -> torch.device:
    """The device that a runtime's model is loaded on.

    Args:
        runtime: One of :data:`RUNTIMES`.
        device: What the user asks for; ``auto`` and ``cpu`` (the default of most calls) fit every runtime.

    Raises:
        ConfigError: The runtime is unknown.
        DeviceError: The device is not there, or not one for the runtime.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f"unknown runtime {str(runtime)[:60]!r}; choose from {', '.join(RUNTIMES)}.")
    if runtime == "torch":
        return resolve_device(device)
    wanted = {"onnx": "cpu", "cuda": "cuda"}[runtime]
    resolved = resolve_device(wanted if str(device) in ("auto", "cpu") else device)
    if resolved.type != wanted:
        needs = "the processor" if runtime == "onnx" else "an NVIDIA GPU"
        raise DeviceError(f"runtime {runtime} needs {needs}, not {resolved}; use runtime torch there.")
    return resolved


def use_runtime(model: PreTrainedModel, runtime: str) -> PreTrainedModel:
    """Has a model compute in a runtime, in place.

    Args:
        model: On :func:`device_for` the runtime.
        runtime: ``torch`` is where it computes without this call. ``onnx`` runs both halves on ONNX Runtime, quantized
            layers in integers. ``cuda`` multiplies integers on an NVIDIA GPU, the image encoder in bfloat16 between
            them.

    Returns:
        The model.

    Raises:
        CarsamError: The runtime is unknown or not installed, or cannot run the model.
    """
    if runtime == "torch":
        if runs_in(model) is not None:
            run_in(model, None)
        return model
    device_for(runtime, model.device)
    if runtime == "onnx":
        from carsam.runtime.onnx import onnx_halves

        run_in(model, onnx_halves(model))
    elif runtime == "cuda":
        from carsam.runtime.cuda import run_on_integers

        run_on_integers(model)
    return model
