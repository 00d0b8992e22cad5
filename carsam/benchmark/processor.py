"""The processor in words: its name, and the instruction sets that decide how fast its arithmetic is."""

from __future__ import annotations

import os
import platform
from pathlib import Path

# Those for wide floating point, bfloat16 and 8-bit products, by the names of Linux.
INSTRUCTIONS = {
    "avx2": "AVX2",
    "fma": "FMA",
    "avx512f": "AVX-512F",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8",
    "asimddp": "dot products of bytes",
    "i8mm": "INT8 matrix products",
    "bf16": "BF16",
    "sve": "SVE",
}


def processor() -> str:
    """Name of the processor, its instruction sets, and its cores."""
    name, flags = platform.processor() or platform.machine(), set()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            name = value
        elif key in ("flags", "Features"):
            flags = set(value.split())
    found = [word for flag, word in INSTRUCTIONS.items() if flag in flags]
    known = f" ({', '.join(found)})" if found else ""
    return f"{name}{known}, {os.cpu_count()} cores"


def busy() -> float:
    """Processes that want a core, beside this one, over the last minute; 0 where nothing tells."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):  # Windows
        return 0.0
