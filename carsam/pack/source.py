"""Where a packed model lies: a folder, or a model of the Hugging Face Hub in the cache."""

from __future__ import annotations

import re
from pathlib import Path

from carsam.errors import CheckpointError
from carsam.pack.folder import (
    CARD,
    CHECKSUMS,
    CONFIG,
    REQUIRED,
    RESULTS,
    is_packed,
    read_checksums,
    read_config,
    says_packed,
)

# The cache of the Hub: models--OWNER--NAME/snapshots/COMMIT/FILE.
_CACHED = re.compile(r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)")
# Seconds to wait for the Hub before the cache is used, or the error is said.
_PATIENCE = 8


def packed_folder(source: str | Path, revision: str | None = None) -> Path | None:
    """The folder of a packed model, or None where ``source`` is something else (a float model, or nothing at all).

    Args:
        source: A packed folder, or a Hub id as ``owner/name`` or ``owner/name@revision``. What exists on disk comes
            before the Hub. A model of the Hub is downloaded where its files are not in the cache yet.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        CheckpointError: A packed model's files are missing or damaged; the Hub cannot be reached and the cache does not
            have the model.
    """
    from carsam.models.load import is_hub_id

    name = source.as_posix() if isinstance(source, Path) else str(source)
    path = Path(name).expanduser()
    if name and path.exists():
        if not path.is_dir():
            return None
        # A packed folder whose config.json is gone or damaged must fail as one, not as a float model.
        return path if is_packed(path) or ((path / CHECKSUMS).exists() and not _is_float(path)) else None
    hub_id, _, tag = name.partition("@")
    if not is_hub_id(hub_id):
        return None
    folder = _fetch(hub_id, CONFIG, revision or tag or None).parent
    return complete(folder) if says_packed(read_config(folder)) else None


def _is_float(folder: Path) -> bool:
    try:
        return "quantization_config" not in read_config(folder)
    except CheckpointError:
        return False


def complete(folder: Path) -> Path:
    """Downloads what a packed model's folder in the Hub's cache lacks; any other folder stays as it is.

    transformers itself fetches ``config.json`` and the weights only.

    Raises:
        CheckpointError: The Hub cannot be reached, or does not have the files.
    """
    found = _CACHED.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    if found is None or _is_complete(folder):
        return folder
    hub_id, cache = f"{found['owner']}/{found['name']}", folder.parents[2]
    for name in (CHECKSUMS, *REQUIRED):
        if not (folder / name).exists():
            _fetch(hub_id, name, folder.name, cache)
    for name in (RESULTS, CARD):
        _fetch_optional(hub_id, name, folder.name, cache)
    return folder


def _is_complete(folder: Path) -> bool:
    return (folder / CHECKSUMS).is_file() and all((folder / name).is_file() for name in read_checksums(folder))


def _fetch(hub_id: str, name: str, revision: str | None, cache: Path | None = None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, name, revision=revision, cache_dir=cache, etag_timeout=_PATIENCE))
    except (OSError, ValueError, RuntimeError) as error:
        at = f" at revision {revision}" if revision else ""
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(
            f"{hub_id} is no file or folder here, and its {name}{at} could not be had from the Hugging Face Hub or its "
            f"cache: {why.rstrip('.')}. Check the id and the connection (a private model needs hf auth login), or "
            "download the model and pass its folder."
        ) from error


def _fetch_optional(hub_id: str, name: str, revision: str, cache: Path) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hf_hub_download(hub_id, name, revision=revision, cache_dir=cache, etag_timeout=_PATIENCE)
    except (EntryNotFoundError, OSError, ValueError):
        return  # a model that was never measured, or the card could not be had: nothing depends on either
