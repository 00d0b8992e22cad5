"""The facts of a packed folder, read without torch: its files, their checksums, what ``config.json`` says."""

from __future__ import annotations

import hashlib
import re
import stat
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open

from carsam.errors import CheckpointError
from carsam.models.names import names_of_type
from carsam.reading import MAX_YAML_BYTES, read_json, read_text

METHOD, FORMAT_VERSION = "carsam", 1
CONFIG, WEIGHTS, PREPROCESSOR, RECIPE = "config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml"
CHECKSUMS = "SHA256SUMS"
# These change after the model was packed, so they have no checksum.
RESULTS, CARD = "results.json", "README.md"
# What SHA256SUMS must name: a list without the weights would verify nothing.
REQUIRED = (CONFIG, WEIGHTS, PREPROCESSOR, RECIPE)

# A ViT-H with other bits for every site has a config.json of 200 kB and a header of 150 kB.
_MOST_BYTES = {CONFIG: 8 * 2**20, PREPROCESSOR: 2**20, RECIPE: MAX_YAML_BYTES, CHECKSUMS: 2**18}
_MOST_HEADER = 16 * 2**20
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_AGAIN = "get the folder again"
# The image encoder of embedded/sam-nano-256. Meta's have 768, 1024 or 1280 channels and see 1024 pixels.
_STAND_IN = {"hidden_size": 192, "num_hidden_layers": 8, "num_attention_heads": 3, "image_size": 256, "patch_size": 16}
_STAND_IN_NAME = re.compile(r"\bsam2?-nano\b")


def require_file(path: Path) -> Path:
    """Refuses what is no readable file: reading a pipe would wait for ever. Links to files are followed.

    Raises:
        CheckpointError: It is missing, a folder, a pipe or a device.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} lacks {path.name}; {_AGAIN}.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {_reason(error)}.") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is not a file; {_AGAIN}.")
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder.

    Raises:
        CheckpointError: It is missing, too large, not JSON, nested too deeply, or names a setting twice.
    """
    return read_mapping(folder / CONFIG)


def read_mapping(path: Path) -> dict[str, Any]:
    """One of the folder's JSON files.

    Raises:
        CheckpointError: See :func:`read_config`.
    """
    most = _MOST_BYTES[path.name]
    return read_json(require_file(path), _AGAIN, most=most, strict=True, error=CheckpointError)


def says_packed(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` says that its model was packed by carsam."""
    packing = config.get("quantization_config")
    return isinstance(packing, dict) and packing.get("quant_method") == METHOD


def is_packed(folder: str | Path) -> bool:
    """Whether a folder says that it holds a packed carsam model."""
    try:
        return says_packed(read_config(Path(folder)))
    except CheckpointError:
        return False


def read_checksums(folder: Path) -> dict[str, str]:
    """``SHA256SUMS``: name to digest in lower case.

    Raises:
        CheckpointError: It is missing, is not such a list, or does not name every required file.
    """
    sums = folder / CHECKSUMS
    if not sums.exists():
        raise CheckpointError(f"{folder} has no {CHECKSUMS}; it is not a packed carsam model, or an incomplete copy.")
    found: dict[str, str] = {}
    for line in read_text(require_file(sums), _MOST_BYTES[CHECKSUMS], _AGAIN, CheckpointError).splitlines():
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.rstrip())
        name = match[2] if match else ""
        # Names only: a list that leads out of its folder says nothing about the folder.
        if match is None or "/" in name or "\\" in name or "\0" in name or name in ("", ".", "..") or name in found:
            raise CheckpointError(f"{sums} is damaged: it is no list of checksums of the folder's files; {_AGAIN}.")
        found[name] = match[1].lower()
    missing = [name for name in REQUIRED if name not in found]
    if missing:
        raise CheckpointError(f"{sums} is damaged: it does not name {', '.join(missing)}; {_AGAIN}.")
    return found


def checksums_text(folder: Path, names: Iterable[str] = REQUIRED) -> str:
    """The text of ``SHA256SUMS`` for files of a folder."""
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in sorted(names))


def sha256(path: Path) -> str:
    """Digest of a file in hexadecimal.

    Raises:
        CheckpointError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with require_file(path).open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {_reason(error)}.") from error
    return digest.hexdigest()


def verify(folder: Path, *, weights: bool = True) -> None:
    """Checks that a packed folder is whole and unaltered. Files that ``SHA256SUMS`` does not name do not matter.

    Args:
        folder: Packed folder.
        weights: Whether to read the weights too; the loader does so itself, and once is enough.

    Raises:
        CheckpointError: A file is missing, truncated, altered or unreadable, or the folder is not a packed model.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder that carsam quantize wrote.")
    for name, expected in read_checksums(folder).items():
        path = require_file(folder / name)
        if (weights or name != WEIGHTS) and sha256(path) != expected:
            raise CheckpointError(
                f"{path} is truncated or altered: its checksum differs from {CHECKSUMS}; get it again."
            )
    if not says_packed(read_config(folder)):
        raise CheckpointError(f"{folder / CONFIG} does not describe a packed carsam model.")


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a safetensors file holds, without reading its tensors: name to (kind such as ``U8``, shape).

    Raises:
        CheckpointError: It is cut short, or its header does not fit it.
    """
    try:
        # The length is checked here first: what a file claims must not decide how much is read.
        with require_file(path).open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        if length > min(_MOST_HEADER, path.stat().st_size - 8):
            raise ValueError("its header is longer than it can be")
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, ValueError, struct.error, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is not a safetensors file, or truncated or altered; get it again. ({_reason(error)})"
        ) from error


def is_stand_in(config: Mapping[str, Any], base: str) -> bool:
    """Whether a model is the embedded stand-in, or was made from it: its scores say nothing about SAM.

    Told by the encoder, which a renamed copy and the stressed twin share, and by the name of the model.

    Args:
        config: What ``config.json`` holds.
        base: Name of the model that the packed one was made from; empty where it is not known.
    """
    encoder = names_of_type(config.get("model_type")).encoder_settings(config)
    return all(encoder.get(key) == value for key, value in _STAND_IN.items()) or _STAND_IN_NAME.search(base) is not None


def portable(value: Any) -> Any:
    """A value (nested mappings and lists of settings or results) without paths of this machine.

    An absolute path, or one that leads out of the current folder, becomes its last component; names and relative paths
    stay as they were given.
    """
    if isinstance(value, Mapping):
        return {portable(key): portable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(item) for item in value]
    return portable_path(value) if isinstance(value, str) else value


def portable_path(text: str) -> str:
    """One path as :func:`portable` stores it; other text as it is."""
    if "/" not in text and "\\" not in text:
        return text
    windows, posix = PureWindowsPath(text), PurePosixPath(text)
    if windows.drive or text.startswith(("\\", "\\\\")):
        return windows.name
    if posix.is_absolute() or ".." in windows.parts or text.startswith("~"):
        return windows.name if ".." not in windows.name else "model"
    return text


def _reason(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "permission denied; ask its owner to let you read it (chmod a+r)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
