"""File sizes of the published SAM and SAM 2 architectures at 4 bits, measured on random weights.

    python benchmarks/sizes.py --sizes vit-b,vit-l,vit-h
    python benchmarks/sizes.py --sizes sam2-tiny,sam2-small,sam2-base-plus,sam2-large

Each model is quantized by RTN (one random image sets the ranges, whose number does not change the size), packed, loaded
back, and its file compared with the FP16 file of the same model.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import options
from calibration import random_data
from random_models import NAMES, random_model
from safetensors.torch import save_file

import carsam
from carsam.config import QuantizeConfig
from carsam.models.family import family_of
from carsam.pack.checkpoint import folder_size
from carsam.run.memory import peak_memory

# Of the FP16 file.
LIMITS = {"vit-b": 0.30, "vit-l": 0.28, "vit-h": 0.28}
SAM2_LIMIT = 0.35


def main() -> int:
    parser = options.parser(__doc__)
    parser.add_argument("--sizes", default="vit-b,vit-l,vit-h", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--bits", default="w4a4")
    arguments = options.parse(parser)
    options.head("model", "FP16 file", "packed file", "share", "quantized and reloaded in", "peak memory")
    too_large = False
    for size in arguments.sizes.split(","):
        model = random_model(size).requires_grad_(False)
        with tempfile.TemporaryDirectory() as folder:
            half = Path(folder) / "half.safetensors"
            tied = set(model._tied_weights_keys)
            weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if k not in tied}
            save_file(weights, half)
            full_bytes = half.stat().st_size
            del weights
            half.unlink()
            started = time.perf_counter()
            settings = {"weight_observer": "min-max", "activation_observer": "min-max"}
            config = QuantizeConfig("rtn", settings, arguments.bits)
            data = random_data(family_of(model).image_size(model), 1, 1)
            carsam.quantize(model, data, config, out=Path(folder) / "packed")
            packed_bytes = folder_size(Path(folder) / "packed")
        share = packed_bytes / full_bytes
        too_large |= arguments.bits == "w4a4" and share > LIMITS.get(size, SAM2_LIMIT)
        seconds, memory = time.perf_counter() - started, peak_memory() / 2**30
        files = (f"{count / 1e6:.1f} MB" for count in (full_bytes, packed_bytes))
        options.row(size, *files, f"{share:.3f}", f"{seconds:.0f} s", f"{memory:.1f} GiB")
    return int(too_large)


if __name__ == "__main__":
    sys.exit(main())
