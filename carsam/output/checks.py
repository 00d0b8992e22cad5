"""What decides a run's result, by name; whether there is space; whether what was written is what was computed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from carsam.bits.plan import BitPlan
from carsam.config import QuantizeConfig
from carsam.errors import CarsamError
from carsam.methods.base import Method
from carsam.models.sites import Sites
from carsam.output.partial import Partial
from carsam.output.target import Output
from carsam.pack.checkpoint import packed_state
from carsam.prompts.calibration import CalibrationSet
from carsam.run.store import code_fingerprint, config_fingerprint, model_fingerprint, versions
from carsam.version import __version__


def base_ingredients(model: PreTrainedModel, data: CalibrationSet, seed: int, device: torch.device) -> dict[str, Any]:
    """What decides the result beside bits and the method's settings, by name for people; JSON-able."""
    return {
        "the model's weights": model_fingerprint(model),
        "the model's configuration or normalisation": config_fingerprint(model),
        "the calibration data": data.fingerprint,
        "seed": seed,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "carsam's code": code_fingerprint(),
        **versions(),
    }


def ingredients(
    model: PreTrainedModel, data: CalibrationSet, method: Method, config: QuantizeConfig, device: torch.device
) -> dict[str, Any]:
    """Everything that decides the result, by name for people; JSON-able."""
    return {
        "method": config.method,
        "bits": config.bits,
        "bits for sites": dict(config.overrides),
        "budget": config.budget,
        "decoder only": config.decoder_only,
        **{f"setting {name}": value for name, value in _flat(method.to_dict()).items()},
        "carsam": __version__,
        **base_ingredients(model, data, config.calibration.seed, device),
    }


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and value
        found.update(_flat(value, f"{before}{name}.") if nested else {before + name: _plain(value)})
    return found


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def check_space(output: Output, model: PreTrainedModel, sites: Sites, plan: BitPlan, partial: Partial) -> None:
    """Refuses a disk that cannot hold what the run will write.

    Raises:
        CarsamError: There is less space than the packed folder and the units kept meanwhile need.
    """
    sizes = {site.name: model.get_submodule(site.name).weight.numel() for site in sites.layers}
    others = sum(value.numel() for value in model.state_dict().values()) - sum(sizes.values())
    packed = sum(size * min(plan.weight_bits(name), 16) // 8 for name, size in sizes.items()) + 2 * others
    kept = sum(path.stat().st_size for path in partial.units())
    need = packed + max(0, sum(sizes.values()) - kept)
    free = shutil.disk_usage(output.target.parent).free
    if free < need:
        raise CarsamError(
            f"writing {output.path} needs about {need / 1e6:.0f} MB, but {output.target.parent} has only "
            f"{free / 1e6:.0f} MB free. Free space there, or choose another folder with --out."
        )


def check_equal(computed: PreTrainedModel, loaded: PreTrainedModel, path: Path) -> None:
    """Compares what was computed with what was loaded back from the written folder.

    Raises:
        CarsamError: They differ; the disk or the memory is faulty.
    """
    first, second = packed_state(computed), packed_state(loaded)
    names = [name for name in {**first, **second} if not _same(first.get(name), second.get(name))]
    if names:
        raise CarsamError(
            f"what was read back from {path} is not what was written ({names[0]}); is the disk faulty? Run again."
        )


def _same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None or first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(first.contiguous().view(-1).view(torch.uint8), second.contiguous().view(-1).view(torch.uint8))
