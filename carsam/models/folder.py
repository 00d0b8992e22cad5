"""A float model from a folder: ``config.json`` with weights by transformers' names, or weights as published."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from carsam.data.images.normalisation import BUFFERS, PREPROCESSOR, read_normalisation, set_normalisation
from carsam.errors import CheckpointError
from carsam.models.family import Family, families, family_of_type
from carsam.models.files.state import some
from carsam.models.files.torch import DamagedFileError
from carsam.models.files.weights import read_tensors, tensor_shapes, training_leftover, weight_files
from carsam.models.skeleton import BAD_CONFIG, fill_buffers, skeleton

HUB_EXAMPLE = "facebook/sam-vit-base"
CONFIG = "config.json"
_LARGEST_CONFIG = 2**20


def load_folder(folder: Path, source: str, image_size: int | None = None) -> PreTrainedModel:
    """The model in a folder, with the normalisation that the folder says.

    Args:
        folder: On disk; of a Hub id, the one in the cache.
        source: What errors call it: the path or the id.
        image_size: Side of the input in pixels where the user asks for one.

    Raises:
        CheckpointError: It holds no model, or a damaged, incomplete or foreign one.
    """
    config = read_config(folder, source)
    if config is not None:
        _check_kind(config, source)
    files = weight_files(folder)
    try:
        shapes = {name: shape for file in files for name, shape in tensor_shapes(file).items()}
    except DamagedFileError as error:
        raise CheckpointError(f"the weights in {source} are damaged or cut short: {error}") from error
    published = next((f for f in families().values() if any(n.endswith(f.published_anchor) for n in shapes)), None)
    own = False
    if published is not None:
        state = published.find_state(_all_tensors(files), source)
        model = published.from_state(state, source, image_size)
        own = any(name in state for name in BUFFERS)
    elif config is None:
        raise CheckpointError(_without_config(folder, source, bool(files)))
    else:
        if not files:
            raise CheckpointError(
                f"the weights in {source} cannot be read: there are none. A folder needs config.json and "
                "model.safetensors."
            )
        family = family_of_type(config.get("model_type"))
        assert family is not None  # _check_kind
        model = _load_transformers(family, folder, source, config, files, shapes)
        check_image_size(family, model, source, image_size)
        published = family
    path = folder / PREPROCESSOR
    if path.is_file():
        said = read_normalisation(path, published.image_size(model))
        if said is not None and not own:
            set_normalisation(model, said)
    return model


def check_image_size(family: Family, model: PreTrainedModel, source: str, image_size: int | None) -> None:
    """Refuses an image size that is not the model's.

    Raises:
        CheckpointError: It is another.
    """
    own = family.image_size(model)
    if image_size is not None and image_size != own:
        raise CheckpointError(f"{source} takes images of {own} pixels, not {image_size}; leave out the image size.")


def read_config(folder: Path, source: str) -> dict[str, Any] | None:
    """``config.json`` of a folder; None where there is none.

    Raises:
        CheckpointError: It cannot be read or holds no settings.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise CheckpointError(f"config.json of {source} cannot be read: it has {path.stat().st_size:,} bytes.")
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: it is no valid JSON. ({first_line(error)})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"config.json of {source} cannot be read: it holds no settings.")
    return config


def _check_kind(config: dict[str, Any], source: str) -> None:
    """Refuses configurations that are not a float SAM's."""
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else "unknown method"
    if quantization and method == "carsam":
        raise CheckpointError(f"{source} is already quantized by carsam; open it with carsam.load({source!r}).")
    if quantization:
        raise CheckpointError(f"{source} is already quantized ({method}); carsam starts from floating-point weights.")
    kind = config.get("model_type")
    if family_of_type(kind) is None:
        note = " SAM-HQ is not supported." if kind == "sam_hq" else ""
        known = " or ".join(f'"{name}"' for family in families().values() for name in family.names.model_types)
        raise CheckpointError(
            f"{source} is a model of type {kind!r}, not {known}.{note} Use a SAM such as {HUB_EXAMPLE}."
        )


def _load_transformers(
    family: Family,
    folder: Path,
    source: str,
    config: dict[str, Any],
    files: list[Path],
    shapes: dict[str, tuple[int, ...]],
) -> PreTrainedModel:
    found = next((name for name in shapes if name.endswith(family.anchor)), family.anchor)
    prefix = found[: -len(family.anchor)]
    bare = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    family.check_declared(config, bare, source)
    if prefix:
        tensors = {name: value for name, value in _all_tensors(files).items() if name.startswith(prefix)}
        return _assemble(family, config, {name.removeprefix(prefix): value for name, value in tensors.items()}, source)
    try:
        # Sizes that differ are collected here and reported below with the rest, instead of as a traceback.
        model, info = from_folder(family, folder, ignore_mismatched_sizes=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise CheckpointError(
            f"the weights in {source} are damaged or cut short; download them again. ({first_line(error)})"
        ) from error
    except (OSError, *BAD_CONFIG) as error:
        raise CheckpointError(
            f"the weights in {source} cannot be read: {first_line(error)} A folder needs config.json and "
            "model.safetensors."
        ) from error
    _report(source, {kind: info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")})
    return model


def from_folder(family: Family, folder: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What transformers loads from a folder: the model in float32 with eager attention, and its report on the keys.

    Raises:
        Whatever transformers raises for a folder that it cannot load.
    """
    with quiet_transformers(bars=False):
        return family.model_class.from_pretrained(
            str(folder),
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
            **options,
        )


def _assemble(family: Family, config: dict[str, Any], state: dict[str, Tensor], source: str) -> PreTrainedModel:
    """The model from tensors whose names had a prefix, which transformers would not find."""
    model = skeleton(family.model_class, family.model_class.config_class.from_dict(config))
    expected = model.state_dict()
    tied = set(model._tied_weights_keys or ())
    for one, other in (model._tied_weights_keys or {}).items():
        if one not in state and other in state:
            state[one] = state[other]
        if other not in state and one in state:
            state[other] = state[one]
    known = set(state) & set(expected)
    _report(
        source,
        {
            "missing": sorted(set(expected) - tied - set(state)),
            "unexpected": sorted(set(state) - set(expected)),
            "mismatched": sorted(name for name in known if state[name].shape != expected[name].shape),
        },
    )
    model.load_state_dict({name: state[name].to(torch.float32, copy=True) for name in expected}, assign=True)
    model.tie_weights()
    fill_buffers(model)
    return model


def _report(source: str, wrong: dict[str, Any]) -> None:
    for kind, fix in (
        ("missing", "The weights are incomplete: download or save them again."),
        ("unexpected", "config.json and the weights belong to different models, or this is a variant of SAM."),
        ("mismatched", "config.json and the weights belong to different models."),
    ):
        # A mismatched key comes with its two shapes.
        keys = sorted(key if isinstance(key, str) else key[0] for key in wrong[kind])
        if keys:
            raise CheckpointError(f"{source} has {kind} weights: {some(keys)}. {fix}")


def _all_tensors(files: list[Path]) -> dict[str, Tensor]:
    return {name: value for file in files for name, value in read_tensors(file).items()}


def _without_config(folder: Path, source: str, has_weights: bool) -> str:
    """What to do with a folder that has no config.json; only files that can be a model are proposed."""
    start = f"{source} has no config.json, so it is not a transformers model; "
    inside = _with_config(folder)
    if inside:
        return f"{start}pass one of the folders in it: {', '.join(str(entry) for entry in inside[-3:])}."
    if has_weights:
        return (
            f"{start}its weights have transformers' names: copy the config.json of the model that it was trained from "
            f"(such as {HUB_EXAMPLE}) into it, and pass the folder again."
        )
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".pth", ".pt", ".safetensors"))
    files = [file for file in files if file.is_file() and not training_leftover(file)]
    if files:
        files.sort(key=lambda file: ("sam" not in file.name.lower(), file.name))
        return f"{start}pass the file itself: {files[0]}."
    return f"{start}pass a folder that has one, or a checkpoint file in Meta's form."


def _with_config(folder: Path) -> list[Path]:
    """Folders inside that hold a model, ``checkpoint-900`` before ``checkpoint-1000``."""
    inside = [entry for entry in folder.iterdir() if entry.is_dir() and (entry / CONFIG).is_file()]
    return sorted(inside, key=lambda entry: (len(entry.name), entry.name))


def first_line(error: Exception) -> str:
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
