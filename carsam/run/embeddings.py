"""Image embeddings on disk: an image encoder runs once for an image, whoever asks for it.

An embedding lies under a key of everything that decides its bits: the encoder's tensors, modules and settings, the
pixels as they enter it, code, versions, device and threads. What comes back is what the encoder gave, in its own number
format and order in memory, so that no score depends on whether it was kept. Several processes may share a folder: files
appear whole, and one that is gone or damaged is computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from carsam.errors import CarsamError, ConfigError
from carsam.models.family import family_of
from carsam.models.forward import served
from carsam.output.files import whole_file
from carsam.output.user_cache import CACHE_VARIABLE, cache_folder
from carsam.run.store import code_fingerprint, fingerprint, versions, without_provenance

logger = logging.getLogger(__name__)

FOLDER, SIZE_VARIABLE, GIGABYTES = "embeddings", "CARSAM_EMBEDDINGS_GB", 4.0
# Of the files; others are never read.
FORMAT = 1
_DAMAGE = (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, RecursionError)
# What is left after the oldest files went: room for some more before the folder is looked through again.
_AFTER_DROPPING = 0.9


class Embeddings:
    """Image embeddings in a folder.

    Args:
        folder: Where they lie; in the user's cache folder if None. Created when the first one is kept.
        gigabytes: What all of them may take (10⁹ bytes); beyond it those that were not used for longest go. 0 keeps and
            reads nothing. None: ``$CARSAM_EMBEDDINGS_GB``, or 4.

    Attributes:
        found: Embeddings taken from the folder.
        computed: Embeddings that were not there.

    Raises:
        ConfigError: The size is no number, or below 0.
    """

    def __init__(self, folder: str | Path | None = None, gigabytes: float | None = None):
        self.folder = Path(folder) if folder is not None else cache_folder() / FOLDER
        self.limit = int(1e9 * (_gigabytes() if gigabytes is None else _checked(gigabytes, "gigabytes")))
        self.found = self.computed = 0
        self._room = 0  # bytes that may be written before the folder is looked through again
        self._usable = self.limit > 0

    @contextmanager
    def serving(self, model: nn.Module) -> Iterator[None]:
        """Inside the block, :func:`carsam.models.forward.encode_image` of this model (no copy of it) asks here first.

        The image encoder must not change meanwhile; the model may change its device.
        """
        if not self._usable:
            yield
            return
        encoder: list[str] = []  # its fingerprint, once somebody asks

        def source(pixel_values: Tensor, encode: Callable[[], Tensor]) -> Tensor:
            if not encoder:
                encoder.append(encoder_fingerprint(model))
            return self._get(embedding_key(encoder[0], model, pixel_values), model.device, encode)

        with served(model, source):
            yield

    def _get(self, key: str, device: torch.device, encode: Callable[[], Tensor]) -> Tensor:
        path = self.folder / f"{key[:40]}.safetensors"
        kept = self._read(path, key)
        if kept is not None:
            self.found += 1
            return kept.to(device)
        embedding = encode()
        self.computed += 1
        self._keep(path, key, embedding.detach().cpu())
        return embedding

    def _read(self, path: Path, key: str) -> Tensor | None:
        """The embedding in a file; None where it is not there, or damaged (then a line says so)."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata, values = file.metadata() or {}, file.get_tensor("embedding")
            if metadata.get("checksum") != _checksum(key, values, metadata.get("stride", "")):
                raise ValueError("its checksum differs")
            # Into memory of its own, laid out as it was: the order of a tensor in memory can decide last bits.
            laid_out = torch.empty_strided(values.shape, json.loads(metadata["stride"]), dtype=values.dtype)
            laid_out.copy_(values)
        except FileNotFoundError:
            return None
        except _DAMAGE as error:
            if not os.path.lexists(path):
                return None  # another process dropped it
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            logger.warning("a kept image embedding is damaged (%s: %s), so it is computed again.", path, reason)
            return None
        with suppress(OSError):
            os.utime(path)
        return laid_out

    def _keep(self, path: Path, key: str, embedding: Tensor) -> None:
        """Writes an embedding; where that is impossible, a line says so once, and nothing is kept any more."""
        size = embedding.numel() * embedding.element_size()
        if not self._usable or size > self.limit:
            return
        stride = json.dumps(embedding.stride())
        values = embedding.contiguous()
        try:
            with whole_file(path) as temporary:
                metadata = {"stride": stride, "checksum": _checksum(key, values, stride)}
                save_file({"embedding": values}, temporary, metadata=metadata)
            self._room -= path.stat().st_size
            if self._room < 0:
                self._drop()
        except (OSError, SafetensorError, CarsamError) as error:
            self._usable = False
            logger.warning(
                "image embeddings cannot be kept in %s (%s), so each is computed anew. Set %s to a folder that can be "
                "written to, or %s=0.",
                self.folder,
                str(error).splitlines()[0][:200],
                CACHE_VARIABLE,
                SIZE_VARIABLE,
            )

    def _drop(self) -> None:
        """Removes the files that were not used for longest until the rest fits."""
        files = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(".safetensors") and not entry.name.startswith("."):
                    with suppress(OSError):
                        status = entry.stat()
                        files.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        if total > self.limit:
            for _, size, path in sorted(files)[:-1]:  # never the newest, which was just asked for
                if total <= _AFTER_DROPPING * self.limit:
                    break
                with suppress(OSError):
                    os.unlink(path)
                total -= size
        # Other processes write too: look again when half of what is left is used.
        self._room = (self.limit - total) // 2


def encoder_fingerprint(model: nn.Module) -> str:
    """SHA-256 of what decides a model's image embeddings beside the pixels: tensors, modules and settings."""
    encoder = family_of(model).embedding_module(model)
    digest = hashlib.sha256(f"{type(encoder).__module__}\0{encoder!r}\0".encode())
    config = getattr(encoder, "config", None) or getattr(model, "config", None)
    if config is not None:
        settings = without_provenance(json.loads(config.to_json_string(use_diff=False)))
        # transformers chooses among attentions that differ in last bits, and does not write down which.
        settings["attention"] = getattr(config, "_attn_implementation", None)
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def embedding_key(encoder: str, model: nn.Module, pixel_values: Tensor) -> str:
    """The key of one embedding.

    Args:
        encoder: From :func:`encoder_fingerprint`.
        model: Where it runs, and in which number format.
        pixel_values: ``(B, 3, S, S)``, normalised and padded: whatever was done to the image is in them.
    """
    device = model.device
    machine: Any = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        machine = (torch.cuda.get_device_name(device), torch.backends.cudnn.allow_tf32)
    return fingerprint(
        FORMAT,
        encoder,
        str(model.dtype),
        hashlib.sha256(_bytes(pixel_values)).hexdigest(),
        [tuple(pixel_values.shape), pixel_values.stride(), str(pixel_values.dtype)],
        [device.type, machine, torch.get_num_threads(), torch.get_float32_matmul_precision()],
        code_fingerprint(scores=True),  # a packed encoder runs the layers of packed models
        versions(),
    )


def _checksum(key: str, values: Tensor, stride: str) -> str:
    digest = hashlib.sha256(f"{key}\0{values.dtype}\0{tuple(values.shape)}\0{stride}\0".encode())
    digest.update(_bytes(values))
    return digest.hexdigest()


def _bytes(value: Tensor) -> Any:
    """A tensor's bytes in row-major order."""
    value = value.detach().cpu().contiguous()
    return value.view(-1).view(torch.uint8).numpy() if value.numel() else b""


def _gigabytes() -> float:
    text = os.environ.get(SIZE_VARIABLE, "").strip()
    if not text:
        return GIGABYTES
    try:
        return _checked(float(text), SIZE_VARIABLE)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{SIZE_VARIABLE} must be a number of gigabytes from 0, not {text[:60]!r}.") from None


def _checked(gigabytes: float, name: str) -> float:
    if not 0 <= gigabytes < math.inf:
        raise ConfigError(f"{name} must be a number of gigabytes from 0, not {gigabytes}.")
    return gigabytes
