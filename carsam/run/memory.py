"""Memory of this process."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import torch


def peak_memory(device: torch.device | None = None) -> int:
    """Peak memory in bytes: of the GPU if ``device`` is one, of the process otherwise; 0 where nothing tells."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # Unix only
    except ImportError:
        return _peak_working_set()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_memory() -> None:
    """Gives memory that was freed back to the system, where the C library keeps it (glibc).

    Tensors of one unit leave holes between those that stay; over the units of a ViT-B the process would come to hold
    twice what is alive in it.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; None with other C libraries."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # musl has none
        return None


def _peak_working_set() -> int:
    """Windows' peak working set of this process in bytes; 0 where it cannot be asked for."""
    from ctypes import wintypes

    library = getattr(ctypes, "WinDLL", None)
    if library is None:
        return 0

    class Counters(ctypes.Structure):
        """PROCESS_MEMORY_COUNTERS."""

        _fields_ = (
            ("size", wintypes.DWORD),
            ("page_faults", wintypes.DWORD),
            ("peak_working_set", ctypes.c_size_t),
            ("others", ctypes.c_size_t * 7),
        )

    kernel = library("kernel32")
    kernel.GetCurrentProcess.restype = wintypes.HANDLE
    ask = kernel.K32GetProcessMemoryInfo
    ask.argtypes = (wintypes.HANDLE, ctypes.POINTER(Counters), wintypes.DWORD)
    ask.restype = wintypes.BOOL
    counters = Counters(size=ctypes.sizeof(Counters))
    found = ask(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.size)
    return counters.peak_working_set if found else 0
