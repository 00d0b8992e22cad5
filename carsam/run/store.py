"""Finished units on disk: what ``--resume`` continues from, and what rows of a comparison share.

A unit's file is named by a key that chains over everything that decides its bytes: model, calibration data, seed, code,
and the settings of this unit and of all units before it. A file is therefore never stale: other settings, other name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from carsam.compensate.acnr import AcnrReport
from carsam.compensate.mac import MacReport
from carsam.compensate.refit import RefitReport
from carsam.data.images.transforms import preprocessor_config
from carsam.errors import CarsamError
from carsam.methods.base import registry
from carsam.models.family import families
from carsam.output.files import whole_file
from carsam.plugins import outside_sources
from carsam.quantizers import QuantizedLayer, SiteQuantizer, activation_grids, softmax_grids
from carsam.reconstruct.optimize import UnitReport
from carsam.reconstruct.units import Unit

logger = logging.getLogger(__name__)

# What reading a damaged file raises.
_DAMAGE = (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, AttributeError, RecursionError)
# What only shows results or talks to people; everything else decides numbers, wherever it is moved to.
_PRESENTATION = (
    "__init__.py",
    "__main__.py",
    "cli.py",
    "commands/",
    "errors.py",
    "output/",
    "report/",
    "run/course.py",
    "run/memory.py",
    "run/progress.py",
)
# What families call their modules for people.
_NAMES = "models/*names.py"
# What comes after the units: a change there leaves finished units as good as they were.
_AFTER_UNITS = (
    "diagnose/",
    "evaluate/",
    "pack/",
    "predict/",
    "run/comparison.py",
    "run/comparison_table.py",
    "run/measured.py",
)
_PACKAGES = ("torch", "transformers", "numpy", "scipy")


def fingerprint(*parts: Any) -> str:
    """SHA-256 of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of all weights and their names, and of the normalisation of pixels where it is the model's own."""
    digest = hashlib.sha256()
    own = getattr(getattr(model, "config", None), "carsam_normalisation", None)
    if own is not None:
        digest.update(repr(own).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def config_fingerprint(model: nn.Module) -> str:
    """SHA-256 of what decides a model's outputs beside its weights: its configuration and preprocessing."""
    values = json.loads(model.config.to_json_string(use_diff=False))
    return fingerprint(without_provenance(values), preprocessor_config(model))


def without_provenance(values: Any) -> Any:
    """A configuration without the entries that say where it comes from."""
    if not isinstance(values, dict):
        return values
    left_out = ("_name_or_path", "transformers_version", "architectures")
    return {name: without_provenance(value) for name, value in values.items() if name not in left_out}


def versions(*more: str) -> dict[str, str]:
    """Versions of the packages that decide numbers."""
    return {name: version(name) for name in (*_PACKAGES, *more)}


@functools.cache
def code_fingerprint(*, scores: bool = False) -> str:
    """SHA-256 of the sources that decide the numbers of units, and with ``scores`` also those of measurements.

    Sources of other packages that bring families, methods or grids count as well.
    """
    package = Path(__file__).parent.parent
    left_out = _PRESENTATION if scores else _PRESENTATION + _AFTER_UNITS
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if not name.startswith(left_out) and not fnmatch(name, _NAMES):
            digest.update(name.encode())
            digest.update(path.read_bytes())
    outside = (*map(type, families().values()), *registry().values())
    outside += (*activation_grids().values(), *softmax_grids().values())
    for name, path in outside_sources(outside):
        digest.update(name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def unit_state(model: nn.Module, unit: Unit) -> dict[str, torch.Tensor]:
    """Everything that a finished unit holds, by module path."""
    state: dict[str, torch.Tensor] = {}
    for path in unit.scope:
        for name, module in model.get_submodule(path).named_modules(prefix=path):
            if isinstance(module, QuantizedLayer):
                if module.codes is None:
                    state[f"{name}.weight"] = module.weight.detach()
                else:
                    state[f"{name}.codes"] = module.codes
                    state[f"{name}.weight_scale"] = module.weight_scale
                    state[f"{name}.weight_zero_point"] = module.weight_zero_point
                if module.bias is not None:
                    state[f"{name}.bias"] = module.bias.detach()
            elif isinstance(module, SiteQuantizer):
                state.update({f"{name}.{key}": value for key, value in module.named_buffers(recurse=False)})
    return {name: value.cpu().contiguous() for name, value in state.items()}


@torch.no_grad()
def load_unit_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Puts back what :func:`unit_state` returned."""
    modules = dict(model.named_modules())
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        path, _, kind = name.rpartition(".")
        parts.setdefault(path, {})[kind] = value
    for path, values in parts.items():
        module = modules[path]
        if isinstance(module, SiteQuantizer):
            module.load_grid(values)
            continue
        device = module.weight.device
        if "codes" in values:
            grid = (values["codes"], values["weight_scale"], values["weight_zero_point"])
            module.set_codes(*(value.to(device) for value in grid))
        else:
            module.weight.copy_(values["weight"])
        if "bias" in values:
            module.bias.copy_(values["bias"])


class UnitStore:
    """A folder of finished units.

    Args:
        folder: Where they lie; created when the first unit is saved. None keeps nothing.
        create: Creates the folder in another way.
    """

    def __init__(self, folder: Path | None, *, create: Callable[[], None] | None = None):
        self.folder = folder
        self._create = create

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key[:40]}.safetensors"

    def load(self, key: str, model: nn.Module, name: str = "") -> tuple[UnitReport, list[Any]] | None:
        """Restores the unit of that key; None where it is not there, or damaged (then a line says so).

        Nothing of a damaged file reaches the model.
        """
        if self.folder is None or not os.path.lexists(self._path(key)):
            return None
        try:
            state, reports = _read_unit(self._path(key), key)
            found = unit_report(reports["unit"]), [compensation_report(values) for values in reports["mac"]]
        except _DAMAGE as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            logger.warning(
                "the kept unit %s is damaged (%s: %s), so it is computed again.", name, self._path(key), reason
            )
            return None
        load_unit_state(model, state)
        return found

    def save(self, key: str, model: nn.Module, unit: Unit, report: UnitReport, mac: list[Any]) -> None:
        """Saves a finished unit: written beside and moved into place, so that a kill leaves no half file.

        Raises:
            CarsamError: The disk is full or the folder not writable.
        """
        if self.folder is None:
            return
        state = unit_state(model, unit)
        reports = json.dumps({"unit": asdict(report), "mac": [asdict(r) for r in mac]})
        metadata = {"reports": reports, "checksum": _checksum(key, state, reports)}
        try:
            if self._create is not None:
                self._create()
            with whole_file(self._path(key)) as temporary:
                save_file(state, temporary, metadata=metadata)
        except (OSError, SafetensorError, CarsamError) as error:
            raise CarsamError(
                f"cannot save progress in {self.folder}: {error}. Free space there and run again."
            ) from error


def _read_unit(path: Path, key: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and reports of a unit's file.

    Raises:
        One of ``_DAMAGE``: They are not what was written.
    """
    if not path.is_file():
        raise ValueError("it is no file")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata.get("checksum") != _checksum(key, state, metadata.get("reports", "")):
        raise ValueError("its checksum differs")
    return state, json.loads(metadata["reports"])


def _checksum(key: str, state: dict[str, torch.Tensor], reports: str) -> str:
    """SHA-256 of everything that a unit's file holds, and of the key that it is for."""
    digest = hashlib.sha256(f"{key}\0{reports}\0".encode())
    for name, value in sorted(state.items()):
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy() if value.numel() else b"")
    return digest.hexdigest()


def unit_report(values: dict[str, Any]) -> UnitReport:
    """A unit's report from JSON."""
    return UnitReport(**{**values, "losses": [tuple(point) for point in values["losses"]]})


def compensation_report(values: dict[str, Any]) -> MacReport | AcnrReport | RefitReport:
    """A compensation's report from JSON."""
    if "refitted" in values:
        return RefitReport(**{**values, "error": tuple(values["error"]), "rounded": tuple(values["rounded"])})
    if "layer" in values:
        return AcnrReport(**{**values, "condition": tuple(values["condition"]), "error": tuple(values["error"])})
    return MacReport(**{**values, "scores": tuple(values["scores"]), "output": tuple(values["output"])})
