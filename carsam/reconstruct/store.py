"""Finished units on disk: what ``--resume`` continues from, and what rows of a comparison share.

A unit's file is named by a key that chains over everything that decides its bytes: model, calibration data, seed, code,
and the settings of this unit and of all units before it. A file is therefore never stale: other settings, other name.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from carsam.errors import CarsamError
from carsam.quantizers import QuantizedLayer, SiteQuantizer
from carsam.reconstruct.optimize import UnitReport
from carsam.reconstruct.units import Unit
from carsam.transform.mac import MacReport

# Folders whose code decides the numbers; a unit finished by other code must not be continued from.
CODE_FOLDERS = ("models", "data", "calibrate", "quantizers", "transform", "reconstruct", "methods")


def fingerprint(*parts: Any) -> str:
    """SHA-256 of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of all weights and their names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def code_fingerprint() -> str:
    """SHA-256 of the sources that decide the numbers, and of torch's version."""
    digest = hashlib.sha256(torch.__version__.encode())
    package = Path(__file__).parent.parent
    for folder in CODE_FOLDERS:
        for path in sorted((package / folder).glob("*.py")):
            digest.update(path.name.encode())
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
        read: Whether units found there are used (a run that does not resume only writes).
    """

    def __init__(self, folder: Path | None, *, read: bool = True):
        self.folder = folder
        self.read = read

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key[:40]}.safetensors"

    def load(self, key: str, model: nn.Module) -> tuple[UnitReport, list[MacReport]] | None:
        """Restores the unit of that key; None where it is not there."""
        if self.folder is None or not self.read or not self._path(key).exists():
            return None
        try:
            with safe_open(self._path(key), framework="pt") as file:
                reports = json.loads(file.metadata()["reports"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError):
            return None  # a damaged file is a unit that is not finished
        load_unit_state(model, state)
        mac = [MacReport(**{**r, "scores": tuple(r["scores"]), "output": tuple(r["output"])}) for r in reports["mac"]]
        unit = reports["unit"]
        unit["losses"] = [tuple(point) for point in unit["losses"]]
        return UnitReport(**unit), mac

    def save(self, key: str, model: nn.Module, unit: Unit, report: UnitReport, mac: list[MacReport]) -> None:
        """Saves a finished unit: written beside and moved into place, so that a kill leaves no half file.

        Raises:
            CarsamError: The disk is full or the folder not writable.
        """
        if self.folder is None:
            return
        path = self._path(key)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        reports = json.dumps({"unit": asdict(report), "mac": [asdict(r) for r in mac]})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(unit_state(model, unit), temporary, metadata={"reports": reports})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink()
            raise CarsamError(
                f"cannot save progress in {self.folder}: {error}. Free space there and run again."
            ) from error
