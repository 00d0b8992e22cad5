"""Reading a PyTorch file without running any code in it, and naming what is no PyTorch file."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from carsam.errors import CheckpointError

_MULTIARRAY = (np._core if hasattr(np, "_core") else np.core).multiarray
_LFS = b"version https://git-lfs.github.com/spec/"
# Numbers of numpy beside the weights (an epoch's loss): harmless, but torch refuses them unless told.
_NUMPY = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd"),
    (_MULTIARRAY.scalar, "numpy.core.multiarray.scalar"),
    (_MULTIARRAY.scalar, "numpy._core.multiarray.scalar"),
    (_MULTIARRAY._reconstruct, "numpy.core.multiarray._reconstruct"),
    (_MULTIARRAY._reconstruct, "numpy._core.multiarray._reconstruct"),
]


def read_torch_file(path: Path) -> object:
    """The content of a ``.pth``, ``.pt`` or ``.bin`` file; no code in it runs.

    Raises:
        CheckpointError: Damaged, of another kind, pickled code, or larger when read than the file is.
    """
    is_zip = False
    try:
        _check_kind(path)
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_zip(path)
        # Only the zip form can be mapped; mapping keeps one copy of ViT-H's 2.5 GB out of memory.
        with torch.serialization.safe_globals(_NUMPY):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        # A whole zip with an unreadable pickle, or any pickle that asks for a foreign name, wants to run code.
        if is_zip or re.search(r"GLOBAL|reduce for unrecognized", str(error), re.IGNORECASE):
            wanted = re.search(r"(?:GLOBAL|Unsupported class|function) ([\w.]*\w\.\w+)", str(error))
            what = f" ({wanted[1]})" if wanted else ""
            raise CheckpointError(
                f"{path} contains pickled code{what} and was refused; if you trust its origin, load it where it was "
                "made and save the weights alone: torch.save(model.state_dict(), path)."
            ) from error
        raise damaged(path, error) from error
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: permission denied.") from error
    except (
        *(RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError),
        *(zipfile.BadZipFile, MemoryError),
    ) as error:
        raise damaged(path, error) from error
    _check_backed(content, path)
    return content


class DamagedFileError(CheckpointError):
    """A file that is no PyTorch file, or no longer one."""


def damaged(path: Path, error: Exception | str) -> DamagedFileError:
    """The error for a file that cannot be read."""
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "weights_only" in reason:  # torch's advice to switch its protection off is none for a file of unknown origin
        reason = "it holds no tensors that PyTorch can read"
    return DamagedFileError(
        f"{path} cannot be read as a PyTorch checkpoint: it is damaged, cut short or of another kind; download it "
        f"again. ({reason[:160]})"
    )


def check_placeholder(path: Path) -> None:
    """Names what is often saved in the place of weights: an empty file, git-lfs' pointer, a web page.

    Raises:
        CheckpointError: It is one of them.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: permission denied.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not head:
        raise damaged(path, "the file is empty")
    if head.startswith(_LFS):
        raise damaged(path, "it is git-lfs' pointer to the weights, not the weights: run git lfs pull in its folder")
    if re.match(rb"\s*<(!doctype|html|\?xml|head)", head, re.IGNORECASE):
        raise damaged(path, "it is a web page that was saved under this name: the link needs a login or has moved")


def _check_kind(path: Path) -> None:
    check_placeholder(path)
    with path.open("rb") as file:
        head = file.read(8)
    for start, kind, fix in (
        (b"\x1f\x8b", "a gzip archive", "unpack it first"),
        (b"Rar!", "a RAR archive", "unpack it first"),
        (b"7z\xbc\xaf", "a 7z archive", "unpack it first"),
        (b"\x89HDF", "an HDF5 file", "carsam reads PyTorch weights"),
        (b"\x89PNG", "a picture", "pass the weights"),
        (b"\xff\xd8\xff", "a picture", "pass the weights"),
    ):
        if head.startswith(start):
            raise damaged(path, f"it is {kind}: {fix}")


def _check_zip(path: Path) -> None:
    """PyTorch's zip holds one folder with ``data.pkl``, uncompressed."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    names = [member.filename for member in members]
    if not any(name.endswith("data.pkl") or name.endswith("/constants.pkl") for name in names):
        inside = next((name for name in names if name.lower().endswith((".pth", ".pt", ".safetensors", ".bin"))), None)
        first = inside or ", ".join(names[:3])
        kind = f"it is a zip archive with {first}: unpack it first" if names else "it is an empty zip archive"
        raise damaged(path, kind)
    size = path.stat().st_size
    packed = [member for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed or sum(member.file_size for member in members) > size:
        raise damaged(path, "its parts are compressed, which PyTorch does not do: save it again with torch.save")


def mappings(content: object, depth: int = 4) -> Iterator[Mapping]:
    """Every mapping inside a checkpoint, outermost first, each once."""
    seen: set[int] = set()
    level = [content]
    for _ in range(depth):
        following: list[object] = []
        for value in level:
            if isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                yield value
                following.extend(inner for inner in value.values() if isinstance(inner, Mapping))
        level = following


def _check_backed(content: object, path: Path) -> None:
    """Refuses tensors that claim more numbers than the file holds (a stride of 0, one storage under many names)."""
    claimed, size = 0, path.stat().st_size
    counted: set[int] = set()
    for mapping in mappings(content):
        for name, value in mapping.items():
            if not isinstance(value, Tensor) or id(value) in counted or value.device.type == "meta":
                continue
            counted.add(id(value))
            if value.layout != torch.strided:
                raise CheckpointError(f"{path}: {name} is a sparse tensor; save it with .to_dense().")
            bytes_ = value.numel() * value.element_size()
            claimed += bytes_
            if bytes_ > value.untyped_storage().nbytes() or claimed > 4 * size + 2**20:
                raise CheckpointError(
                    f"{path}: its tensors claim more numbers than the file of {size:,} bytes holds (at {name}); save "
                    "them with .contiguous().clone()."
                )
