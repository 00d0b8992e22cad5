"""Checks of a packed model against its files: sizes before it is built, tensors before loading, values after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from carsam.errors import CheckpointError
from carsam.models.family import family_of_type
from carsam.pack.folder import CHECKSUMS, CONFIG, WEIGHTS, read_header, verify
from carsam.pack.layers import PackedLayer
from carsam.pack.source import complete
from carsam.quantizers.affine import qmax
from carsam.quantizers.grid import Grid


def verified_folder(files: Sequence[Path]) -> Path:
    """The folder that transformers loads from, complete and verified.

    Raises:
        CheckpointError: It is not a packed folder, or incomplete, altered or damaged.
    """
    if len(files) != 1 or files[0].name != WEIGHTS:
        raise CheckpointError(
            f"a packed model lies in one file {WEIGHTS}, not in {', '.join(path.name for path in files[:3])}: "
            f"{CHECKSUMS} vouches for no other. Get the folder again."
        )
    # Not resolved: in the Hub's cache the files are links, and the folder is where the links are.
    folder = complete(files[0].parent)
    verify(folder)
    return folder


def check_sizes(config: PreTrainedConfig, layout: dict[str, Any]) -> None:
    """Refuses a configuration that would take for ever to build, from what the layout says.

    Raises:
        CheckpointError: No family has such a model, or its layers are not those of the layout, or beyond any model's.
    """
    family = family_of_type(config.model_type)
    if family is None:
        raise CheckpointError(f"the {CONFIG} of the packed folder describes no SAM; get the folder again.")
    if wrong := family.too_large(config, (*layout["layers"], *layout["attentions"])):
        raise CheckpointError(f"the {CONFIG} of the packed folder is damaged: {wrong}; get the folder again.")


def check_tensors(model: PreTrainedModel, files: Sequence[Path]) -> None:
    """Refuses files that do not hold exactly the tensors of a packed model, in name, shape and kind.

    Args:
        model: From :func:`carsam.pack.layout.build_packed`.
        files: The files that its tensors will be loaded from; none where they come from memory.

    Raises:
        CheckpointError: A tensor is missing or of another form, or there is one that the model has no place for.
    """
    if not files:
        return
    found = {name: entry for path in files for name, entry in read_header(path).items()}
    expected = model.state_dict()
    tied = set(model._tied_weights_keys or ())
    wrong = dict.fromkeys(set(expected) - tied - set(found), "missing")
    wrong |= dict.fromkeys(set(found) - set(expected), "unexpected")
    for name, (kind, shape) in found.items():
        if name not in expected:
            continue
        kinds = ("F16", "F32", "BF16") if expected[name].is_floating_point() else ("U8",)
        if kind not in kinds:
            wrong[name] = f"of kind {kind}"
        elif tuple(expected[name].shape) != shape:
            wrong[name] = f"of shape {list(shape)} instead of {list(expected[name].shape)}"
    if wrong:
        listed = ", ".join(f"{name} ({wrong[name]})" for name in sorted(wrong)[:3])
        raise CheckpointError(
            f"{', '.join(str(path) for path in files)} does not hold the tensors that config.json describes: {listed}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}; it is damaged, get it again."
        )


def check_values(model: nn.Module) -> None:
    """Refuses a packed model whose grids or weights cannot have been written by carsam.

    Raises:
        CheckpointError: A scale is missing, not finite or not positive; a zero point, group or granularity is none of
            its grid; a weight is not finite.
    """
    for name, module in model.named_modules():
        why = _fault(module)
        if why:
            raise CheckpointError(f"the packed folder has {why} for {name}; it is damaged, get it again.")
    for name, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"the packed folder has a value that is not finite in {name}; get it again.")


def _fault(module: nn.Module) -> str:
    """What is wrong with the grid of a module; empty where nothing is."""
    if isinstance(module, PackedLayer):
        if not _positive(module.weight_scale):
            return "no usable scale"
        return "no usable zero point" if int(module.weight_zero_point.max()) > qmax(module.weight_bits) else ""
    return module.fault() if isinstance(module, Grid) else ""


def _positive(scale: torch.Tensor) -> bool:
    return scale.numel() > 0 and bool((torch.isfinite(scale) & (scale > 0)).all())
