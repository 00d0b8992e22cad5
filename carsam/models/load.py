"""Loading a float SAM: a Hub id, a transformers folder, or one of Meta's checkpoint files."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import SamConfig, SamModel
from transformers.utils import logging as transformers_logging

from carsam.errors import CheckpointError, DeviceError
from carsam.models.meta_checkpoint import read_meta_file, sam_from_meta
from carsam.models.random_init import BAD_CONFIG, skeleton

META_SUFFIXES = (".pth", ".pt")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_EXAMPLE = "facebook/sam-vit-base"


def load_model(source: str | Path, *, device: str | torch.device = "cpu") -> SamModel:
    """Loads a SAM in floating point, ready to be quantized.

    Args:
        source: A Hub id such as ``facebook/sam-vit-base``, a transformers folder (``config.json``,
            ``model.safetensors``), or a Meta checkpoint file such as ``sam_vit_b_01ec64.pth``. What exists on disk
            comes before the Hub.
        device: Where the model goes: "cpu", "cuda", "cuda:1", or "auto" (a GPU when there is one).

    Returns:
        The model in float32 (weights stored in FP16 are upcast) and evaluation mode, its parameters frozen, with
        eager attention.

    Raises:
        CheckpointError: Nothing there, damaged, incomplete, not a SAM, or already quantized.
        DeviceError: The device is not available.
    """
    target = resolve_device(device)  # first: no need to read gigabytes for a device that is not there
    name = source.as_posix() if isinstance(source, Path) else str(source)
    path = Path(name).expanduser()
    if name and path.is_dir():  # Path("") would be the current folder
        model = _load_transformers(path)
    elif path.is_file():
        model = _load_file(path)
    elif is_hub_id(name):
        model = _load_transformers(name)
    else:
        raise CheckpointError(
            f"no such file or folder: {name}. Pass a Meta checkpoint (.pth), a transformers folder, or a Hub id such "
            f"as {HUB_EXAMPLE}."
        )
    _require_finite(model, name)
    return model.to(target).eval().requires_grad_(False)


def is_hub_id(name: str) -> bool:
    """Whether a source that is not on disk can be a Hub id: ``owner/name``, and no checkpoint file's ending."""
    return not name.lower().endswith(META_SUFFIXES) and HUB_ID.fullmatch(name) is not None


def resolve_device(device: str | torch.device) -> torch.device:
    """The device for a request, checked to be there.

    Args:
        device: "auto" (a GPU when there is one, else the CPU), or what ``torch.device`` takes.

    Raises:
        DeviceError: Not a device, not available, or a kind that carsam does not run on.
    """
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


def _load_file(path: Path) -> SamModel:
    if path.suffix.lower() in (".safetensors", ".json", ".bin"):
        raise CheckpointError(f"{path} is one file of a model; pass its folder, which also holds config.json.")
    if path.suffix.lower() == ".onnx":
        raise CheckpointError(f"{path} is an ONNX file; carsam quantizes the PyTorch weights it was made from.")
    return sam_from_meta(read_meta_file(path), str(path))


def _load_transformers(source: Path | str) -> SamModel:
    """Loads a folder (a path) or a Hub id (a string) through transformers, and checks what it left undone."""
    local = isinstance(source, Path)
    _check_config(_read_config(source), str(source))
    try:
        with quiet_transformers(bars=not local):
            # Sizes that differ are collected here and reported below with the rest, instead of as a traceback.
            model, info = SamModel.from_pretrained(
                str(source),
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=local,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise CheckpointError(
            f"the weights in {source} are damaged or cut short; download them again. ({_first_line(error)})"
        ) from error
    except (OSError, *BAD_CONFIG) as error:
        if local:
            raise CheckpointError(
                f"the weights in {source} cannot be read: {_first_line(error)} A folder needs config.json and "
                "model.safetensors."
            ) from error
        raise CheckpointError(_unreachable(str(source), error)) from error
    for kind, mend in (
        ("missing", "The weights are incomplete: download or save them again."),
        ("unexpected", "config.json and the weights belong to different models, or this is a variant of SAM."),
        ("mismatched", "config.json and the weights belong to different models."),
    ):
        # A mismatched key comes with its two shapes.
        keys = sorted(key if isinstance(key, str) else key[0] for key in info[f"{kind}_keys"])
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(f"{source} has {kind} weights: {', '.join(keys[:3])}{more}. {mend}")
    return model


def _read_config(source: Path | str) -> dict[str, Any]:
    if isinstance(source, Path) and not (source / "config.json").is_file():
        checkpoints = sorted(file.name for file in source.iterdir() if file.suffix.lower() in META_SUFFIXES)
        hint = f"pass the file itself: {source / checkpoints[0]}" if checkpoints else "pass a folder that has one"
        raise CheckpointError(f"{source} has no config.json, so it is not a transformers model; {hint}.")
    try:
        config = SamConfig.get_config_dict(str(source), local_files_only=isinstance(source, Path))[0]
    except (OSError, ValueError) as error:
        if isinstance(source, Path):
            raise CheckpointError(f"{source / 'config.json'} cannot be read: {_first_line(error)}") from error
        raise CheckpointError(_unreachable(source, error)) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"config.json of {source} cannot be read: it holds no settings.")
    return config


def _check_config(config: dict[str, Any], source: str) -> None:
    """Refuses configurations that are not a float SAM's."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method == "carsam":
        raise CheckpointError(f"{source} is already quantized by carsam; open it with carsam.load({source!r}).")
    if method:
        raise CheckpointError(f"{source} is already quantized ({method}); carsam starts from floating-point weights.")
    kind = config.get("model_type")
    if kind != "sam":
        note = " SAM 2 is not supported yet." if str(kind).startswith("sam2") else ""
        raise CheckpointError(
            f'{source} is a model of type {kind!r}, not "sam".{note} Use a SAM such as {HUB_EXAMPLE}.'
        )
    try:
        skeleton(SamConfig.from_dict(config))
    except BAD_CONFIG as error:
        raise CheckpointError(f"config.json of {source} does not describe a SAM: {_first_line(error)}") from error


def _unreachable(hub_id: str, error: Exception) -> str:
    return (
        f"{hub_id} is no file or folder here, and loading it from the Hugging Face Hub failed: {_first_line(error)} "
        "Check the id and the connection, or download the model and pass its folder."
    )


def _require_finite(model: SamModel, source: str) -> None:
    bad = [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    if bad:
        raise CheckpointError(f"{source} holds NaN or infinite weights ({bad[0]}); the file is damaged.")


def _first_line(error: Exception) -> str:
    """The gist of a library's error: its first line with words, ended by a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines[0] if lines else type(error).__name__)
    return text if text.endswith((".", "!", "?")) else f"{text}."


@contextmanager
def quiet_transformers(bars: bool) -> Iterator[None]:
    """Silences transformers' load report (what it says is raised as one error instead), and its bars unless ``bars``.

    A download from the Hub takes minutes and keeps its bars.
    """
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar and not bars:
            transformers_logging.enable_progress_bar()
