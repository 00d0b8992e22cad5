"""Writing of a packed model's files; ``model.save_pretrained`` and ``model.push_to_hub`` of packed models."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from carsam.data.images.transforms import preprocessor_config
from carsam.errors import CarsamError, CheckpointError
from carsam.models.family import find_sites
from carsam.models.implementations import NOTICE
from carsam.output.files import current_umask, write_json
from carsam.pack.folder import (
    CARD,
    CHECKSUMS,
    CONFIG,
    PREPROCESSOR,
    RECIPE,
    RESULTS,
    WEIGHTS,
    checksums_text,
    is_packed,
    portable,
    read_mapping,
    sha256,
)
from carsam.pack.layers import PackedLayer
from carsam.pack.layout import describe
from carsam.pack.model_card import base_licence, model_card, with_id, with_tags
from carsam.pack.transformers import CarsamQuantizationConfig
from carsam.quantizers.grid import Grid
from carsam.reading import read_json, read_text, read_yaml
from carsam.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

_MOST_RESULTS, _MOST_CARD = 256 * 2**20, 2**20


@dataclass(frozen=True)
class Facts:
    """What a packed folder holds beside the model.

    Attributes:
        recipe: ``recipe.yaml``.
        preprocessor: ``preprocessor_config.json``; None where the model itself says it.
        results: ``results.json``.
        card: ``README.md``; None where there is none yet.
    """

    recipe: dict[str, Any]
    preprocessor: dict[str, Any] | None = None
    results: dict[str, Any] = field(default_factory=dict)
    card: str | None = None


def read_facts(folder: Path) -> Facts:
    """The facts in a packed folder.

    Raises:
        CheckpointError: The recipe or the preprocessing is damaged.
    """
    recipe = read_yaml(folder / RECIPE, "get the folder again", error=CheckpointError)
    if not isinstance(recipe, dict):
        raise CheckpointError(f"{folder / RECIPE} is damaged: it holds no settings; get the folder again.")
    results: dict[str, Any] = {}
    card = None
    try:
        if (folder / RESULTS).is_file():
            results = read_json(folder / RESULTS, "measure again", most=_MOST_RESULTS)
        if (folder / CARD).is_file():
            card = read_text(folder / CARD, _MOST_CARD, "write it again")
    except CarsamError:
        pass  # scores and card come beside the model; a damaged one must not keep it from loading
    return Facts(recipe, read_mapping(folder / PREPROCESSOR), results, card)


def packed_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of the file: bytes and zero points as they are, grids in FP32, the rest in FP16.

    Scales stay in FP32: in FP16 those of small weights would be subnormal, and they are a thousandth of the file.
    """
    state = {}
    tied = set(model._tied_weights_keys or ())
    exact = _exact(model)
    for name, value in model.state_dict().items():
        if name in tied:
            continue
        value = value.detach().cpu()
        if value.is_floating_point() and name not in exact:
            half = value.to(torch.float16)
            if not bool(torch.isfinite(half).all()):
                raise CheckpointError(f"{name} holds values beyond the range of FP16; it cannot be stored.")
            value = half
        state[name] = value.contiguous()
    return state


def _exact(model: PreTrainedModel) -> set[str]:
    """Names of the tensors that stay as they are: the buffers of grids, and the scales of weights."""
    names = set()
    for path, module in model.named_modules():
        if isinstance(module, Grid):
            names.update(f"{path}.{name}" for name, _ in module.named_buffers(recurse=False))
        elif isinstance(module, PackedLayer):
            names.add(f"{path}.weight_scale")
    return names


def write_packed(model: PreTrainedModel, folder: Path, facts: Facts) -> None:
    """Writes all files of a packed model into an empty folder.

    Args:
        model: From :func:`carsam.pack.layout.pack`, or loaded.
        folder: Where to.
        facts: What is stored beside the model.

    Raises:
        OSError, SafetensorError: The disk is full, or the folder is not writable.
    """
    recipe, results = portable(facts.recipe), portable(facts.results)
    save_file(packed_state(model), folder / WEIGHTS, metadata={"format": "pt"})
    # safetensors gives its files the mode 0600; others of the umask's group could read all files but this.
    (folder / WEIGHTS).chmod(0o666 & ~current_umask())
    config = json.loads(model.config.to_json_string(use_diff=True))
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "float32"
    config["attn_implementation"] = NOTICE
    config["quantization_config"] = _quantization_config(model, recipe).to_dict()
    _write_json(folder / CONFIG, config)
    _write_json(folder / PREPROCESSOR, facts.preprocessor or preprocessor_config(model))
    _write_text(folder / RECIPE, yaml.safe_dump(recipe, sort_keys=False))
    _write_text(folder / CHECKSUMS, checksums_text(folder))
    # From here on without checksums: these two change when the model is measured.
    if results:
        write_json(folder / RESULTS, results)
    licence = base_licence(str(facts.recipe.get("model") or ""))
    card = facts.card or model_card(config, recipe, results, (folder / WEIGHTS).stat().st_size, licence)
    _write_text(folder / CARD, card)


def _quantization_config(model: PreTrainedModel, recipe: dict[str, Any]) -> CarsamQuantizationConfig:
    return CarsamQuantizationConfig(
        describe(model, find_sites(model)),
        bits=str(recipe.get("bits", "")),
        method=str(recipe.get("method", "")),
        carsam_version=str(recipe.get("carsam_version") or __version__),
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    _write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _write_text(path: Path, text: str) -> None:
    # Line ends as they are on every system: SHA256SUMS counts bytes.
    path.write_text(text, encoding="utf-8", newline="\n")


def attach(model: PreTrainedModel, facts: Facts) -> PreTrainedModel:
    """Lets a packed model's ``save_pretrained`` and ``push_to_hub`` write the packed form, and gives it its config.

    The methods are set on the model, which stays the class that transformers gave: a subclass would not be known to
    transformers' pipelines and output recorders. Copies of the model get their own.
    """
    if not isinstance(getattr(model.config, "quantization_config", None), CarsamQuantizationConfig):
        model.config.quantization_config = _quantization_config(model, facts.recipe)
    model.carsam_facts = facts
    model.save_pretrained = partial(save_pretrained, model)
    model.push_to_hub = partial(push_to_hub, model)
    return model


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    *,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    variant: str | None = None,
    **options: Any,
) -> None:
    """``model.save_pretrained(DIR)`` of a packed model: writes the packed form.

    Args:
        model: The packed model.
        save_directory: Created where it is missing.
        is_main_process: As in transformers: others write nothing.
        push_to_hub: Also upload the model, to ``repo_id`` (the folder's name without one).
        repo_id: ``owner/name``.
        state_dict, variant: Not possible for a packed model.
        options: Of the upload (see :func:`push_to_hub`); transformers' other options change nothing: the file is small
            and is never split.

    Raises:
        CarsamError: The folder cannot be written, or other tensors or a variant are asked for.
    """
    if state_dict is not None or variant is not None:
        raise CarsamError("a packed model is saved as it is; leave out state_dict and variant.")
    if not is_main_process:
        return
    folder = Path(save_directory)
    if folder.exists() and not folder.is_dir():
        raise CarsamError(f"{folder} is a file; give a folder to save to.")
    _write_into(model, folder)
    if push_to_hub:
        known = ("commit_message", "commit_description", "private", "token", "revision", "create_pr")
        upload(folder, repo_id or folder.resolve().name, **{k: v for k, v in options.items() if k in known})


def _write_into(model: PreTrainedModel, folder: Path) -> None:
    """Writes a packed model into a folder that may hold files already; those of its names are replaced.

    The new files are written beside the old ones first. Checksums come last: half of the files are no packed model.

    Raises:
        CarsamError: The disk is full, or the folder is not writable.
    """
    temporary = folder / f".carsam-save.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        write_packed(model, temporary, model.carsam_facts)
        (folder / CHECKSUMS).unlink(missing_ok=True)
        if (folder / WEIGHTS).is_file() and sha256(folder / WEIGHTS) != sha256(temporary / WEIGHTS):
            (folder / RESULTS).unlink(missing_ok=True)  # of the model that was here
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == CHECKSUMS):
            os.replace(path, folder / path.name)
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) else None
        raise CarsamError(f"cannot write {folder}: {why or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def push_to_hub(model: PreTrainedModel, repo_id: str, **options: Any) -> CommitInfo:
    """``model.push_to_hub("owner/name")`` of a packed model: uploads the packed form with its model card.

    Args:
        model: The packed model.
        repo_id: ``owner/name``; created where it is missing.
        options: ``commit_message``, ``commit_description``, ``private``, ``token``, ``revision``, ``create_pr`` as in
            transformers; ``tags`` are added to the card's; ``max_shard_size`` changes nothing.

    Raises:
        CarsamError: The Hub cannot be reached, or does not let you write there.
    """
    tags = options.pop("tags", None) or []
    options.pop("max_shard_size", None)
    with tempfile.TemporaryDirectory(prefix="carsam-push-") as temporary:
        folder = Path(temporary)
        write_packed(model, folder, model.carsam_facts)
        card = with_id((folder / CARD).read_text(encoding="utf-8"), repo_id)
        _write_text(folder / CARD, with_tags(card, tags) if tags else card)
        return upload(folder, repo_id, **options)


def upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Uploads a packed folder's own files.

    Raises:
        CarsamError: The Hub cannot be reached, or does not let you write there.
    """
    from huggingface_hub import HfApi

    assert is_packed(folder)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[CONFIG, WEIGHTS, PREPROCESSOR, RECIPE, CHECKSUMS, CARD, RESULTS],
            commit_message=commit_message or "Upload a model packed by carsam",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    except (OSError, ValueError) as error:
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CarsamError(
            f"cannot upload to {repo_id}: {why.rstrip('.')}. Check the name and the connection, and log in with "
            "hf auth login (a token that may write)."
        ) from error
