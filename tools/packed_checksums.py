"""Checksums of every method's packed weights on the embedded model, to prove that a change moves no number.

    python tools/packed_checksums.py > before.txt      (at the old commit)
    python tools/packed_checksums.py | diff before.txt -

One thread and few steps: two runs of the same code print the same lines on the same machine. Another processor may
change the last bits of sums, so compare runs of one machine only.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import torch

import carsam
from carsam.config import CalibrationConfig, QuantizeConfig
from carsam.methods.base import create, registry

ROOT = Path(__file__).resolve().parents[1]
STEPS = {"steps": 3, "decoder_steps": 3}


def checksum(method: str, *, coco: bool) -> str:
    """SHA-256 of ``model.safetensors`` after a short quantization.

    Args:
        method: A registered method.
        coco: Whether the boxes come from the COCO file; otherwise from the model's own masks.
    """
    data = ROOT / "embedded" / "images" / "calibration"
    settings = {"reconstruction": STEPS} if "reconstruction" in create(method).to_dict() else {}
    calibration = CalibrationConfig(
        images=str(data / "images"),
        coco=str(data / "instances.json") if coco else None,
        n_images=4,
        boxes_per_image=3,
    )
    config = QuantizeConfig(method=method, settings=settings, calibration=calibration)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "packed"
        carsam.quantize(ROOT / "embedded" / "sam-nano-256", calibration.images, config, out=out)
        return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Prints a line for each method."""
    torch.set_num_threads(1)
    for method in sorted(registry()):
        print(f"{method:12} boxes of the COCO file    {checksum(method, coco=True)}", flush=True)
    print(f"{'car-sam':12} boxes of the model's own  {checksum('car-sam', coco=False)}", flush=True)


if __name__ == "__main__":
    main()
