"""The weights of a transformers folder: which files they are, and their names and shapes without reading them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from carsam.errors import CheckpointError
from carsam.models.files.torch import check_placeholder, mappings, read_torch_file

WHOLE = ("model.safetensors", "pytorch_model.bin")
# What training leaves beside the weights.
NO_WEIGHTS = ("optimizer", "scheduler", "scaler", "rng_state", "training_args", "random_states")


def weight_files(folder: Path) -> list[Path]:
    """The weights of a folder as transformers looks for them: one file, or the parts that an index names.

    Returns:
        Existing files; empty where the folder has no weights under a name that transformers knows.

    Raises:
        CheckpointError: An index is damaged, or a part that it names is not there.
    """
    for whole in WHOLE:
        if (folder / whole).is_file():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if not index.is_file():
            continue
        try:
            names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index} is damaged: it names no weights; get it again.") from error
        lacking = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if lacking or not names:
            raise CheckpointError(
                f"the weights in {folder} are incomplete: {', '.join(lacking[:3]) or 'every part'} is missing, which "
                f"{index.name} names; get the folder again."
            )
        return [folder / name for name in names]
    return []


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file.

    Raises:
        CheckpointError: It is damaged or of another kind.
    """
    if path.suffix != ".safetensors":
        content = read_torch_file(path)
        for mapping in mappings(content):
            tensors = {str(name): value for name, value in mapping.items() if isinstance(value, Tensor)}
            if tensors:
                return tensors
        return {}
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in list(file.keys())}


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of one file; of ``.safetensors`` only the header is read.

    Raises:
        CheckpointError: It is damaged or of another kind.
    """
    if path.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in read_tensors(path).items()}
    with _open(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}


def _open(path: Path) -> safe_open:
    check_placeholder(path)
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut short; download it again. ({error})") from error


def training_leftover(path: Path) -> bool:
    """Whether a file's name says that it is no model (``optimizer.pt``, ``rng_state.pth``, ...)."""
    return path.name.lower().startswith(NO_WEIGHTS)
