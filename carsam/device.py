"""The one rule for the device of a model: what a user asks for, checked to be there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from carsam.errors import DeviceError

if TYPE_CHECKING:
    import torch


def resolve_device(device: str | torch.device) -> torch.device:
    """The device for a request, checked to be there.

    Args:
        device: "auto" (a GPU when there is one, else the CPU), or what ``torch.device`` takes.

    Raises:
        DeviceError: Not a device, not available, or a kind that carsam does not run on.
    """
    import torch  # here: modules that a light command imports take this one

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"{device!r} is not a device; use cpu, cuda, cuda:0 or auto.") from error
    if resolved.type == "cpu":
        return resolved
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            why = "sees no GPU" if torch.version.cuda or torch.version.hip else "is built for the CPU only"
            raise DeviceError(
                f"device {device} is not available: this PyTorch ({torch.__version__}) {why}. Use cpu or auto, or "
                "install a CUDA build of PyTorch and its driver."
            )
        found = torch.cuda.device_count()
        if resolved.index is not None and resolved.index >= found:
            raise DeviceError(f"device {device} is not available: GPUs here are cuda:0 to cuda:{found - 1}.")
        return resolved
    if resolved.type == "mps" and torch.backends.mps.is_available():
        return resolved
    raise DeviceError(f"device {device} is not available here; use cpu, cuda or auto.")
