"""The packed folder: ``config.json``, ``model.safetensors``, ``preprocessor_config.json``, ``recipe.yaml`` and their
checksums; ``results.json`` when measured. Written beside its place and moved there when whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from carsam.data.images.normalisation import named_normalisation, normalisation_of, set_normalisation
from carsam.errors import CarsamError, CheckpointError
from carsam.models.family import Family, family_of, family_of_type
from carsam.models.folder import check_image_size, from_folder
from carsam.models.load import is_hub_id, load_model
from carsam.models.skeleton import BAD_CONFIG
from carsam.output.target import replaced_folder
from carsam.pack.calibration_places import remember
from carsam.pack.folder import CHECKSUMS, CONFIG, RECIPE, WEIGHTS, is_packed, read_config, read_header, verify
from carsam.pack.source import packed_folder
from carsam.pack.transformers import CarsamQuantizationConfig
from carsam.pack.writing import Facts, packed_state, write_packed

__all__ = [
    "CHECKSUMS",
    "CONFIG",
    "RECIPE",
    "WEIGHTS",
    "folder_size",
    "is_packed",
    "load",
    "open_model",
    "packed_state",
    "save_packed",
]


def save_packed(model: PreTrainedModel, folder: Path, recipe: dict[str, Any], *, overwrite: bool = False) -> None:
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
        write_folder(model, temporary, recipe)


def write_folder(model: PreTrainedModel, folder: Path, recipe: dict[str, Any]) -> None:
    """Writes a packed model's files into an empty folder; see :func:`save_packed`."""
    write_packed(model, folder, Facts(recipe))
    remember(recipe)


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    runtime: str = "torch",
) -> PreTrainedModel:
    """Loads a packed model.

    Args:
        source: What ``carsam quantize``, ``model.save_pretrained`` or ``model.push_to_hub`` wrote: a folder, or a Hub
            id (``owner/name``, ``owner/name@revision``), which works offline when it is in the cache.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``.
        revision: Branch, tag or commit of a Hub id.
        runtime: ``torch`` computes in float32 with the values that the integers stand for, on any device. ``onnx`` runs
            on ONNX Runtime on the processor, quantized layers in integer kernels; the first time, its files are written
            to the user's cache. ``cuda`` multiplies integers on an NVIDIA GPU (on ``cuda`` unless ``device`` names
            one), the image encoder in bfloat16 between them; the first pass compiles for about half a minute.

    Returns:
        A model in eval mode.

    Raises:
        CheckpointError: The folder is incomplete, altered, or not a packed model; the Hub does not have it.
        ConfigError: The runtime is unknown, or not installed.
        DeviceError: The device is not there, or not one for the runtime.
    """
    from carsam.runtime.choose import device_for, use_runtime  # its rooms need this one

    device = device_for(runtime, device)
    folder = packed_folder(source, revision)
    if folder is None:
        folder = _not_packed(source)
    family = check_folder(folder)
    try:
        model, info = from_folder(family, folder)
    except CarsamError:
        raise
    except (OSError, SafetensorError, RecursionError, *BAD_CONFIG) as error:
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{folder} cannot be loaded: {why.rstrip('.')}. Get the folder again.") from error
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise CheckpointError(f"{folder} does not hold the tensors that it should, for example {sorted(wrong)[:3]}.")
    set_normalisation(model, normalisation_of(model))
    return use_runtime(model.to(device).eval().requires_grad_(False), runtime)


def open_model(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    normalise: str | None = None,
    image_size: int | None = None,
    runtime: str = "torch",
) -> PreTrainedModel:
    """A packed or a float model, whichever ``source`` is.

    Args:
        source: What :func:`load` takes, or :func:`carsam.load_model`.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``.
        normalise: ``imagenet``, ``unit`` or ``min-max`` instead of the model's own normalisation.
        image_size: Side of the input in pixels; see :func:`carsam.load_model`. A packed model's is known.
        runtime: See :func:`load`; a float model runs in ``torch`` and ``onnx``.

    Raises:
        CarsamError: It is neither, or damaged; the device is not there; the runtime does not run it.
    """
    from carsam.runtime.choose import device_for, use_runtime

    device = device_for(runtime, device)
    normalisation = None if normalise is None else named_normalisation(normalise)
    folder = packed_folder(source)
    if folder is not None:
        model = load(folder, device=device)
        check_image_size(family_of(model), model, str(source), image_size)
    else:
        model = load_model(source, device=device, image_size=image_size)
    if normalisation is not None:
        set_normalisation(model, normalisation)
    return use_runtime(model, runtime)


def check_folder(folder: Path) -> Family:
    """Checks all of a packed folder but the checksum of its weights, before anything is built.

    Takes milliseconds whatever the files say. The weights are read once, when they are loaded.

    Returns:
        The family of the model.

    Raises:
        CheckpointError: A file is missing, altered or unreadable; ``config.json`` does not fit the weights.
    """
    verify(folder, weights=False)
    config = read_config(folder)
    CarsamQuantizationConfig.from_dict(config["quantization_config"])
    shapes = {name: shape for name, (_, shape) in read_header(folder / WEIGHTS).items()}
    family = family_of_type(config.get("model_type"))
    if family is None:
        raise CheckpointError(
            f"{folder} holds a packed model of type {str(config.get('model_type'))[:60]!r}, which this carsam does not "
            f"know; install the carsam that wrote it, or the package that adds this type."
        )
    # A byte holds four codes of 2 bits.
    family.check_declared(without_packing(config), shapes, str(folder), weights_per_element=4)
    return family


def without_packing(config: dict[str, Any]) -> dict[str, Any]:
    """A packed folder's ``config.json`` as that of the float model it was made from."""
    return {key: value for key, value in config.items() if key not in ("quantization_config", "attn_implementation")}


def _not_packed(source: str | Path) -> Path:
    """Says what a source is that carsam.load does not load.

    Returns:
        The folder, where a look into it says more.
    """
    if Path(os.path.expanduser(source)).is_dir():
        folder = Path(os.path.expanduser(source))
        if (folder / CONFIG).is_file() and not is_packed(folder):
            read_config(folder)
            raise CheckpointError(
                f"{source} is not a packed carsam model; quantize it with carsam quantize, or open a float model with "
                "carsam.load_model."
            )
        return folder
    if is_hub_id(str(source).partition("@")[0]):
        raise CheckpointError(
            f"{source} is not a packed carsam model; quantize it with carsam quantize, or open a float model with "
            "carsam.load_model."
        )
    raise CheckpointError(f"{source} is not a folder; give the folder that carsam quantize wrote, or a Hub id.")


def folder_size(folder: str | Path) -> int:
    """Bytes of the weights file of a model folder."""
    return (Path(folder) / WEIGHTS).stat().st_size
