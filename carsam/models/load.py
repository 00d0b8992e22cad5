"""Loading a float model: a Hub id, a transformers folder, or a checkpoint file as published."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel

from carsam.data.images.normalisation import HUB_ID, named_normalisation, set_normalisation
from carsam.device import resolve_device
from carsam.errors import CheckpointError
from carsam.models.family import families
from carsam.models.files.hub import hub_folder
from carsam.models.files.state import some
from carsam.models.files.torch import mappings, read_torch_file
from carsam.models.files.weights import read_tensors
from carsam.models.folder import CONFIG, HUB_EXAMPLE, load_folder, quiet_transformers

__all__ = ["is_hub_id", "load_model", "quiet_transformers"]

META_SUFFIXES = (".pth", ".pt")


def load_model(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    normalise: str | None = None,
    image_size: int | None = None,
) -> PreTrainedModel:
    """Loads a Segment Anything model in floating point, ready to be quantized.

    Args:
        source: A Hub id such as ``facebook/sam-vit-base``, a transformers folder (``config.json``,
            ``model.safetensors``), or a checkpoint file as published, such as ``sam_vit_b_01ec64.pth``,
            ``mobile_sam.pt`` or ``lite_medsam.pth``. What exists on disk comes before the Hub.
        device: Where the model goes: "cpu", "cuda", "cuda:1", or "auto" (a GPU when there is one).
        normalise: ``imagenet``, ``unit`` (pixels on 0..1) or ``min-max`` (each image stretched to 0..1) instead of the
            model's own normalisation: ``preprocessor_config.json`` of a folder, ``pixel_mean`` and ``pixel_std`` of a
            checkpoint, else the one that its family was trained with (ImageNet's for SAM).
        image_size: Side of the input in pixels, for a checkpoint whose tensors do not show it (a MobileSAM fine-tuned
            at another size); must fit the others.

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
        model = load_folder(path, name, image_size)
    elif path.is_file():
        model = _load_file(path, image_size)
    elif is_hub_id(name):
        model = load_folder(hub_folder(name), name, image_size)
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


def _load_file(path: Path, image_size: int | None) -> PreTrainedModel:
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        raise CheckpointError(f"{path} is an ONNX file; carsam quantizes the PyTorch weights it was made from.")
    if suffix == ".json":
        raise CheckpointError(f"{path} is one file of a model; pass its folder, which also holds the weights.")
    content = read_tensors(path) if suffix == ".safetensors" else read_torch_file(path)
    known = list(families().values())
    for family in known:
        state = family.find_state(content, str(path))
        if state is not None:
            return family.from_state(state, str(path), image_size)
    names = [str(name) for mapping in mappings(content) for name in mapping]
    if suffix not in (".safetensors", ".bin") or not any(
        name.endswith(family.anchor) for name in names for family in known
    ):
        reasons = (family.foreign(content) for family in known)
        why = next((reason for reason in reasons if reason), f"it holds {some(names) or type(content).__name__}.")
        raise CheckpointError(f"{path} is not a SAM checkpoint: {why}")
    if (path.parent / CONFIG).is_file():
        raise CheckpointError(f"{path} is one file of a model; pass its folder, which also holds config.json.")
    raise CheckpointError(
        f"{path} is one file of a model without its config.json: copy the config.json of the model that it was trained "
        f"from (such as {HUB_EXAMPLE}) beside it as well, and pass its folder with both."
    )


def _require_finite(model: PreTrainedModel, source: str) -> None:
    bad = [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    if bad:
        raise CheckpointError(f"{source} holds NaN or infinite weights ({bad[0]}); the file is damaged.")
