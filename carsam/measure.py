"""Time and memory of this process."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory(device: torch.device | None = None) -> int:
    """Peak memory in bytes: of the GPU if ``device`` is one, of the process otherwise."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
