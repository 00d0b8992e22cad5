"""The story of a quantization, one call per stage: load, calibrate, transform, reconstruct, pack.

Evaluation works from the packed folder alone and lives in :mod:`carsam.evaluate`.
"""

from __future__ import annotations

import copy
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import SamModel

import carsam
from carsam.calibrate.cache import CacheSpace
from carsam.calibrate.ranges import calibrate
from carsam.config import QuantizeConfig
from carsam.data.calibration import CalibrationSet, calibration_set
from carsam.errors import CheckpointError
from carsam.measure import peak_memory
from carsam.methods.base import Method, create
from carsam.models.load import load_model, resolve_device
from carsam.models.prepare import prepare_model
from carsam.models.sites import Sites, find_sites
from carsam.pack.checkpoint import load, save_packed
from carsam.pack.layers import PackedLayer
from carsam.pack.layout import pack
from carsam.quantizers import QuantizedLayer
from carsam.reconstruct.store import UnitStore, code_fingerprint, fingerprint, model_fingerprint
from carsam.reconstruct.walk import Progress, Walk, WalkReport, fit_weights, quantized_layers
from carsam.run.target import Output


@dataclass(frozen=True)
class QuantizeResult:
    """What a quantization gives.

    Attributes:
        model: The packed model, in eval mode.
        recipe: The full configuration, as saved in ``recipe.yaml``.
        report: Units and compensations.
        seconds: Wall-clock time of calibration and reconstruction.
        peak_memory: Of the process, in bytes (of the GPU where one was used).
        skipped_images: Calibration images that could not be read.
    """

    model: SamModel
    recipe: dict[str, Any]
    report: WalkReport
    seconds: float
    peak_memory: int
    skipped_images: int

    def to_dict(self) -> dict[str, Any]:
        """Measurements as plain mappings (``results.json`` under ``quantization``)."""
        return {
            "seconds": round(self.seconds, 1),
            "peak_memory_bytes": self.peak_memory,
            "skipped_images": self.skipped_images,
            "units": [asdict(unit) for unit in self.report.units],
            "compensations": [asdict(item) for item in self.report.compensations],
            "transforms": self.report.transforms,
        }


def quantize(
    model: SamModel | str | Path,
    images: str | Path | CalibrationSet,
    config: QuantizeConfig | None = None,
    *,
    out: str | Path | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    unit_cache: str | Path | None = None,
    cache_gigabytes: float = 6.0,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Quantizes a SAM.

    Args:
        model: A float ``SamModel`` (left as it is), or what :func:`carsam.load_model` takes.
        images: Folder of calibration images, or a ready calibration set.
        config: Method, bits and data settings; the default is CAR-SAM at W4A4.
        out: Where to write the packed folder; None keeps the model in memory only.
        device: ``cpu``, ``cuda`` or ``auto``.
        resume: Continue from the units that an interrupted run left beside ``out``.
        overwrite: Replace ``out`` if it exists.
        unit_cache: Folder of finished units that several quantizations share (rows of a comparison).
        cache_gigabytes: Memory for cached activations; beyond it they lie in temporary files.
        progress: Called as ``progress(unit_index, n_units, unit_name, step, n_steps)``.

    Returns:
        The packed model and the reports. With ``out``, the model is the one loaded back from there.

    Raises:
        CarsamError: Anything the user can mend: unknown settings, missing data, an output that exists, a full disk.
    """
    config = config or QuantizeConfig()
    method = create(config.method, config.settings)
    plan = config.bit_plan()
    device = resolve_device(device)
    out = Path(out) if out is not None else None
    if out is not None:
        Output(out, overwrite=overwrite).check()

    if isinstance(model, SamModel) and any(isinstance(module, PackedLayer) for module in model.modules()):
        raise CheckpointError("this model is packed already; quantize the float model that it was made from.")
    source = "" if isinstance(model, SamModel) else str(model)
    reference = copy.deepcopy(model) if isinstance(model, SamModel) else load_model(model)
    reference.requires_grad_(False).eval().float().to(device)
    sites = find_sites(reference)
    plan.check(sites)

    if isinstance(images, CalibrationSet):
        data = images
    else:
        settings = replace(config.calibration, images=str(images))
        config = replace(config, calibration=settings)
        data = calibration_set(reference, **asdict(settings))
    started = time.perf_counter()

    partial = out.with_name(out.name + ".partial") if out is not None else None
    if partial is not None and not resume:
        shutil.rmtree(partial, ignore_errors=True)
    store = UnitStore(Path(unit_cache) if unit_cache is not None else partial)
    quantized, report = _quantize(
        reference, sites, method, plan, data, config, device, store, CacheSpace(int(cache_gigabytes * 2**30)), progress
    )
    seconds = time.perf_counter() - started

    recipe = {
        "carsam_version": carsam.__version__,
        "model": source,
        **config.to_dict(),
        "settings": method.to_dict(),
        "calibration_fingerprint": data.fingerprint,
    }
    packed = pack(quantized, sites)
    if out is not None:
        save_packed(packed, out, recipe, overwrite=overwrite)
        shutil.rmtree(partial, ignore_errors=True)
        packed = load(out, device=device)
    return QuantizeResult(packed, recipe, report, seconds, peak_memory(device), data.skipped)


def _quantize(
    reference: SamModel,
    sites: Sites,
    method: Method,
    plan: Any,
    data: CalibrationSet,
    config: QuantizeConfig,
    device: torch.device,
    store: UnitStore,
    space: CacheSpace,
    progress: Progress | None,
) -> tuple[SamModel, WalkReport]:
    """From the float model to one whose weights are all integers."""
    seed = config.calibration.seed
    transforms = method.transform(reference, sites, data)
    model = copy.deepcopy(reference)
    prepare_model(model, sites, plan, method.quantizer_for, method.softmax_for)
    model.to(device).requires_grad_(False)
    fit_weights(model, method.weight_observer)

    report = WalkReport()
    if method.units(sites):
        bits = [plan.weight_bits(site.name) for site in sites.linears]
        bits += [plan.activation_bits(name) for name in sites.activation_names]
        base_key = fingerprint(
            model_fingerprint(reference),
            data.fingerprint,
            seed,
            bits,
            code_fingerprint(),
            torch.get_num_threads(),
            device,
        )
        walk = Walk(
            model,
            reference,
            sites,
            method,
            data,
            seed=seed,
            device=device,
            base_key=base_key,
            store=store,
            space=space,
            progress=progress,
        )
        report = walk.run()
    else:
        total = len(data.images)
        advance = (lambda done, _: progress(0, 1, "calibration", done, total)) if progress else None
        calibrate(model, data, method.activation_observer, device=device, progress=advance)
        for layer in quantized_layers([model]):
            layer.freeze()
    report.transforms = transforms
    assert all(m.codes is not None or m.weight_bits >= 16 for m in model.modules() if isinstance(m, QuantizedLayer))
    return model, report
