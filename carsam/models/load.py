"""Loading a float SAM: a Hub id, a transformers folder, or one of Meta's checkpoint files."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import SamModel

from carsam.data.images.normalisation import HUB_ID, named_normalisation, set_normalisation
from carsam.device import resolve_device
from carsam.errors import CheckpointError
from carsam.models.files.hub import hub_folder
from carsam.models.files.torch import mappings, read_torch_file
from carsam.models.files.weights import read_tensors
from carsam.models.sam.meta import find_meta_state, read_meta_file, sam_from_meta, why_not_sam
from carsam.models.folder import CONFIG, HUB_EXAMPLE, OUR_ANCHOR, load_folder, quiet_transformers

__all__ = ["is_hub_id", "load_model", "quiet_transformers"]

META_SUFFIXES = (".pth", ".pt")


def load_model(source: str | Path, *, device: str | torch.device = "cpu", normalise: str | None = None) -> SamModel:
    """Loads a SAM in floating point, ready to be quantized.

    Args:
        source: A Hub id such as ``facebook/sam-vit-base``, a transformers folder (``config.json``,
            ``model.safetensors``), or a Meta checkpoint file such as ``sam_vit_b_01ec64.pth``. What exists on disk
            comes before the Hub.
        device: Where the model goes: "cpu", "cuda", "cuda:1", or "auto" (a GPU when there is one).
        normalise: ``imagenet``, ``unit`` (pixels on 0..1) or ``min-max`` (each image stretched to 0..1) instead of the
            model's own normalisation: ``preprocessor_config.json`` of a folder, ``pixel_mean`` and ``pixel_std`` of a
            checkpoint, else ImageNet's.

    Returns:
        The model in float32 (weights stored in FP16 are upcast) and evaluation mode, its parameters frozen, with
        eager attention.

    Raises:
        CheckpointError: Nothing there, damaged, incomplete, not a SAM, or already quantized.
        ConfigError: ``normalise`` is not one of these.
        DeviceError: The device is not available.
    """
    normalisation = None if normalise is None else named_normalisation(normalise)
    target = resolve_device(device)  # first: no need to read gigabytes for a device that is not there
    name = source.as_posix() if isinstance(source, Path) else str(source)
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():  # Path("") would be the current folder
        model = load_folder(path, name)
    elif path.is_file():
        model = _load_file(path)
    elif is_hub_id(name):
        model = load_folder(hub_folder(name), name)
    else:
        raise CheckpointError(
            f"no such file or folder: {name}. Pass a Meta checkpoint (.pth), a transformers folder, or a Hub id such "
            f"as {HUB_EXAMPLE}."
        )
    _require_finite(model, name)
    if normalisation is not None:
        set_normalisation(model, normalisation)
    return model.to(target).eval().requires_grad_(False)


def is_hub_id(name: str) -> bool:
    """Whether a source that is not on disk can be a Hub id: ``owner/name``, and no checkpoint file's ending."""
    return not name.lower().endswith(META_SUFFIXES) and HUB_ID.fullmatch(name) is not None


def _load_file(path: Path) -> SamModel:
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        raise CheckpointError(f"{path} is an ONNX file; carsam quantizes the PyTorch weights it was made from.")
    if suffix == ".json":
        raise CheckpointError(f"{path} is one file of a model; pass its folder, which also holds the weights.")
    if suffix not in (".safetensors", ".bin"):
        return sam_from_meta(read_meta_file(path), str(path))
    content = read_tensors(path) if suffix == ".safetensors" else read_torch_file(path)
    state = find_meta_state(content, str(path))
    if state is not None:
        return sam_from_meta(state, str(path))
    if not any(str(name).endswith(OUR_ANCHOR) for mapping in mappings(content) for name in mapping):
        raise CheckpointError(f"{path} is not a SAM checkpoint: {why_not_sam(content)}")
    if (path.parent / CONFIG).is_file():
        raise CheckpointError(f"{path} is one file of a model; pass its folder, which also holds config.json.")
    raise CheckpointError(
        f"{path} is one file of a model without its config.json: copy the config.json of the model that it was trained "
        f"from (such as {HUB_EXAMPLE}) beside it as well, and pass its folder with both."
    )


def _require_finite(model: SamModel, source: str) -> None:
    bad = [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    if bad:
        raise CheckpointError(f"{source} holds NaN or infinite weights ({bad[0]}); the file is damaged.")
