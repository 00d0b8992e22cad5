"""Files of a model on the Hugging Face Hub: cached or downloaded; an unreachable Hub is said within seconds."""

from __future__ import annotations

import http.client
import importlib
import ssl
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from carsam.errors import CheckpointError

# Seconds until an unanswered request counts as unreachable.
PATIENCE = 4.0
# Seconds for which the answer stands: a model has several files.
_REMEMBER = 30.0

_last: tuple[str, float, str] | None = None


def unreachable_reason(hub_id: str) -> str:
    """Why the Hub cannot be reached now; empty where it answers. Takes no longer than ``PATIENCE``.

    Names, proxies and servers can hang in ways that no single timeout covers, so the question runs in a thread.
    """
    global _last
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "offline mode is on (HF_HUB_OFFLINE=1)"
    endpoint = constants.ENDPOINT
    if _last is not None and _last[0] == endpoint and time.monotonic() - _last[1] < _REMEMBER:
        return _last[2]
    answer: list[str] = []
    thread = threading.Thread(target=_ask, args=(f"{endpoint}/api/models/{hub_id}", answer), daemon=True)
    started = time.monotonic()
    thread.start()
    importlib.import_module("huggingface_hub.file_download")  # seconds on a busy machine: while the Hub is asked
    thread.join(max(0.0, started + PATIENCE - time.monotonic()))
    reason = answer[0] if answer else f"{endpoint} did not answer within {PATIENCE:g} s"
    _last = (endpoint, time.monotonic(), reason)
    return reason


def _ask(url: str, answer: list[str]) -> None:
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE):
            answer.append("")
    except urllib.error.HTTPError:
        answer.append("")  # any answer will do, "no such model" as well
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        # Whose certificates count is for the Hub's own client to say; the server is there.
        answer.append("" if isinstance(reason, ssl.SSLError) else f"{url} cannot be reached ({reason})")


def hub_file(
    hub_id: str, name: str, *, revision: str | None = None, cache: Path | None = None, optional: bool = False
) -> Path | None:
    """One file of a model on the Hub; the cache's where the Hub cannot be reached.

    Args:
        hub_id: ``owner/name``.
        name: The file.
        revision: Branch, tag or commit.
        cache: Folder of the cache; None for the usual one.
        optional: Whether the model may lack it.

    Returns:
        The file in the cache; None where the model lacks it and ``optional``.

    Raises:
        CheckpointError: The model has no such file, there is no such model, or the Hub cannot be reached and the cache
            does not have the file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    reason = unreachable_reason(hub_id)
    # A commit is what another revision was resolved to; its 40 digits would only be in the way.
    wanted = f"{name} at revision {revision}" if revision and len(revision) < 40 else name
    try:
        return Path(
            hf_hub_download(
                hub_id,
                name,
                revision=revision,
                cache_dir=cache,
                etag_timeout=PATIENCE,
                local_files_only=bool(reason),
            )
        )
    except LocalEntryNotFoundError as error:
        # "Not in the cache" may also mean that the model has no such file; only a required one is an error.
        if optional:
            return None
        raise CheckpointError(unreachable_message(hub_id, wanted, reason or _gist(error))) from error
    except EntryNotFoundError as error:
        if optional:
            return None
        raise CheckpointError(
            f"{hub_id} on the Hugging Face Hub has no {name}, so it is not a transformers model. If it holds a "
            "checkpoint in Meta's form (.pth), download that file and pass it."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(unreachable_message(hub_id, wanted, reason or _gist(error))) from error


def hub_folder(hub_id: str, revision: str | None = None) -> Path:
    """The folder in the Hub's cache that holds a float model's configuration and weights, downloaded where needed.

    Raises:
        CheckpointError: See :func:`hub_file`.
    """
    import json

    config = hub_file(hub_id, "config.json", revision=revision)
    folder = config.parent
    commit = folder.name if folder.parent.name == "snapshots" else revision
    hub_file(hub_id, "preprocessor_config.json", revision=commit, optional=True)
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if hub_file(hub_id, whole, revision=commit, optional=True) is not None:
            return folder
        index = hub_file(hub_id, f"{whole}.index.json", revision=commit, optional=True)
        if index is not None:
            try:
                shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} is damaged; delete it and download the model again.") from error
            for shard in shards:
                hub_file(hub_id, str(shard), revision=commit)
            return folder
    hub_file(hub_id, "model.safetensors", revision=commit)
    return folder


def unreachable_message(hub_id: str, name: str, reason: str) -> str:
    """What a user reads when a model cannot be had, with the ways on."""
    return (
        f"{hub_id} is no file or folder here, and loading its {name} from the Hugging Face Hub failed: "
        f"{reason.rstrip('.')}. Check the id and the connection (a private model needs hf auth login). Without a "
        "connection: download the model and pass its folder, pass Meta's checkpoint file (sam_vit_b_01ec64.pth), or "
        "set HF_HUB_OFFLINE=1 for a model that is in the cache already."
    )


def _gist(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
