"""The packed folder: ``config.json``, ``model.safetensors``, ``preprocessor_config.json``, ``recipe.yaml`` and their
checksums; ``results.json`` when measured. Written beside its place and moved there when whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import SamModel

import carsam
from carsam.data.transforms import preprocessor_config
from carsam.errors import CheckpointError
from carsam.models.load import quiet_transformers, resolve_device
from carsam.models.sites import find_sites
from carsam.pack.hub import METHOD, CarsamQuantizationConfig
from carsam.pack.layout import describe
from carsam.run.target import replaced_folder

WEIGHTS, CONFIG, RECIPE, CHECKSUMS = "model.safetensors", "config.json", "recipe.yaml", "SHA256SUMS"
KEEP_FLOAT32 = (".scale", ".weight_scale", ".split", ".offset")


def packed_state(model: SamModel) -> dict[str, torch.Tensor]:
    """The tensors of the file: bytes and zero points as they are, grids in FP32, the rest in FP16.

    Scales stay in FP32: in FP16 those of small weights would be subnormal, and they are a thousandth of the file.
    """
    state = {}
    tied = set(model._tied_weights_keys or ())
    for name, value in model.state_dict().items():
        if name in tied:
            continue
        value = value.detach().cpu()
        if value.is_floating_point() and not name.endswith(KEEP_FLOAT32):
            half = value.to(torch.float16)
            if not bool(torch.isfinite(half).all()):
                raise CheckpointError(f"{name} holds values beyond the range of FP16; it cannot be stored.")
            value = half
        state[name] = value.contiguous()
    return state


def save_packed(model: SamModel, folder: Path, recipe: dict[str, Any], *, overwrite: bool = False) -> None:
    """Writes a packed model.

    Args:
        model: From :func:`carsam.pack.layout.pack`.
        folder: Where to; must not exist unless ``overwrite``.
        recipe: The full configuration, saved as ``recipe.yaml``.
        overwrite: Replace a folder that is there.

    Raises:
        CarsamError: The folder exists, the disk is full, or it is not writable; nothing half-written is left.
    """
    with replaced_folder(Path(folder), overwrite) as temporary:
        save_file(packed_state(model), temporary / WEIGHTS, metadata={"format": "pt"})
        config = json.loads(model.config.to_json_string(use_diff=True))
        config["architectures"] = ["SamModel"]
        config["dtype"] = "float32"
        config["quantization_config"] = CarsamQuantizationConfig(
            describe(model, find_sites(model)),
            bits=recipe["bits"],
            method=recipe["method"],
            carsam_version=carsam.__version__,
        ).to_dict()
        _write_json(temporary / CONFIG, config)
        _write_json(temporary / "preprocessor_config.json", preprocessor_config(model))
        (temporary / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False))
        names = sorted(path.name for path in temporary.iterdir())
        sums = "".join(f"{_sha256(temporary / name)}  {name}\n" for name in names)
        (temporary / CHECKSUMS).write_text(sums)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def is_packed(folder: str | Path) -> bool:
    """Whether a folder says that it holds a packed carsam model."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text())
        return config["quantization_config"]["quant_method"] == METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return False


def verify(folder: Path) -> None:
    """Checks that a packed folder is whole and unaltered.

    Raises:
        CheckpointError: A file is missing, truncated or altered, or the folder is not a packed model.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder that carsam quantize wrote.")
    sums = folder / CHECKSUMS
    if not sums.is_file():
        raise CheckpointError(f"{folder} has no {CHECKSUMS}; it is not a packed carsam model, or an incomplete copy.")
    for line in sums.read_text().splitlines():
        expected, _, name = line.partition("  ")
        if not name or "/" in name:
            raise CheckpointError(f"{sums} is damaged; get the folder again.")
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {name}; get the folder again.")
        if _sha256(path) != expected:
            raise CheckpointError(
                f"{path} is truncated or altered: its checksum differs from {CHECKSUMS}; get it again."
            )
    if not is_packed(folder):
        raise CheckpointError(f"{folder / CONFIG} does not describe a packed carsam model.")


def load(folder: str | Path, *, device: str | torch.device = "cpu") -> SamModel:
    """Loads a packed folder.

    Args:
        folder: What ``carsam quantize`` wrote.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``.

    Returns:
        A ``SamModel`` in eval mode, computing in float32 on the integers of the file.

    Raises:
        CheckpointError: The folder is incomplete, altered, or not a packed model.
        DeviceError: The device is not there.
    """
    folder, device = Path(folder), resolve_device(device)
    verify(folder)
    with quiet_transformers(bars=False):
        model, info = SamModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise CheckpointError(f"{folder} does not hold the tensors that it should, for example {sorted(wrong)[:3]}.")
    return model.to(device).eval().requires_grad_(False)


def folder_size(folder: str | Path) -> int:
    """Bytes of the weights file of a model folder."""
    return (Path(folder) / WEIGHTS).stat().st_size
