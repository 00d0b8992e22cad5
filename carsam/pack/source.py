"""Where a packed model lies: a folder, or a model of the Hugging Face Hub in the cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from carsam.errors import CheckpointError
from carsam.models.files.hub import hub_file
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
    # os.path: a name that is no possible path exists nowhere, which pathlib answers with an error.
    path = Path(os.path.expanduser(name))
    if name and os.path.exists(path):
        if not path.is_dir():
            return None
        # A packed folder whose config.json is gone or damaged must fail as one, not as a float model.
        return path if is_packed(path) or ((path / CHECKSUMS).exists() and not _is_float(path)) else None
    hub_id, _, tag = name.partition("@")
    if not is_hub_id(hub_id):
        return None
    folder = hub_file(hub_id, CONFIG, revision=revision or tag or None).parent
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
            hub_file(hub_id, name, revision=folder.name, cache=cache)
    for name in (RESULTS, CARD):
        # A model that was never measured has no scores; nothing depends on either.
        hub_file(hub_id, name, revision=folder.name, cache=cache, optional=True)
    return folder


def _is_complete(folder: Path) -> bool:
    return (folder / CHECKSUMS).is_file() and all((folder / name).is_file() for name in read_checksums(folder))
