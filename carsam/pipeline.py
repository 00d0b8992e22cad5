"""The story of a quantization, one call per stage: load, choose calibration images, compute integers, pack, verify.

Evaluation works from the packed folder alone and lives in :mod:`carsam.evaluate`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from carsam.bits.allocation import Budget
from carsam.calibrate.cache import CacheSpace
from carsam.config import QuantizeConfig
from carsam.data.images.normalisation import named_normalisation
from carsam.device import resolve_device
from carsam.errors import CarsamError, ConfigError
from carsam.methods.base import create
from carsam.models.family import find_sites
from carsam.models.forward import remembered
from carsam.output.checks import check_equal, check_space, ingredients
from carsam.output.files import write_json
from carsam.output.finished import RESULTS, differing_settings, finished_report, read_quantization, read_recipe
from carsam.output.partial import Partial
from carsam.output.target import Output
from carsam.pack.checkpoint import load, write_folder
from carsam.pack.layout import pack
from carsam.pack.writing import Facts, attach
from carsam.prompts.calibration import CalibrationSet
from carsam.prompts.clips import data_for
from carsam.run.allocation import check_affordable
from carsam.run.context import Hooks, Progress, RunContext
from carsam.run.embeddings import Embeddings
from carsam.run.memory import peak_memory
from carsam.run.progress import Stages
from carsam.run.quantization import QuantizeResult, Run, reference_model, to_integers
from carsam.run.store import UnitStore
from carsam.version import __version__

logger = logging.getLogger(__name__)


def quantize(
    model: PreTrainedModel | str | Path,
    images: str | Path | CalibrationSet,
    config: QuantizeConfig | None = None,
    *,
    out: str | Path | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    write_results: bool = False,
    unit_cache: str | Path | None = None,
    cache_gigabytes: float = 6.0,
    progress: Progress | bool | None = None,
    hooks: Hooks | None = None,
    embeddings: Embeddings | None = None,
) -> QuantizeResult:
    """Quantizes a Segment Anything model.

    With ``out``, finished units are kept in ``OUT.partial`` until the folder is in its place, loaded back and found
    equal to what was computed. Nobody else may write to ``out`` meanwhile.

    Args:
        model: A float model (left as it is), or what :func:`carsam.load_model` takes.
        images: Folder of calibration images, or a ready calibration set.
        config: Method, bits and data settings; the default is CAR-SAM at W4A4.
        out: Where to write the packed folder; None keeps the model in memory only.
        device: ``cpu``, ``cuda`` or ``auto``.
        resume: Continue from the units that an interrupted run left beside ``out``.
        restart: Discard them.
        overwrite: Replace ``out`` if it is a packed model without other files in it.
        write_results: Write ``results.json`` (time, memory, units) into the folder, in the same move.
        unit_cache: Folder of finished units that several quantizations share (rows of a comparison).
        cache_gigabytes: Memory for cached activations; beyond it they lie in temporary files.
        progress: True shows a bar on a terminal or in a notebook, and lines elsewhere. Or what is called as
            ``progress(unit_index, n_units, unit_name, step, n_steps)``; where it has a method
            ``stage(name, done, total)``, that is told of the stages: see :class:`carsam.run.progress.StageProgress`.
        hooks: For whoever measures the run itself; see :class:`carsam.run.context.Hooks`.
        embeddings: Where embeddings of the calibration images are kept and taken from if only the decoder is quantized;
            the user's cache folder if None.

    Returns:
        The packed model and the reports. With ``out``, the model is the one loaded back from there.

    Raises:
        CarsamError: Anything the user can fix: unknown settings, missing data, an output that exists or is in use,
            finished units of an interrupted run without ``resume`` or ``restart``, a full disk.
    """
    started = time.perf_counter()
    config = config or QuantizeConfig()
    if resume and restart:
        raise ConfigError("resume and restart exclude each other; choose one.")
    normalisation = None if config.normalise is None else named_normalisation(config.normalise)
    run = Run(config, create(config.method, config.settings), config.bit_plan(), resolve_device(device))
    if not isinstance(images, CalibrationSet):
        config = run.config = replace(config, calibration=replace(config.calibration, images=str(images)))

    with ExitStack() as stack:
        if progress is True:
            from carsam.commands.progress import shown

            name = "a model" if isinstance(model, PreTrainedModel) else model
            bits = f"a budget of {config.budget}" if config.budget else config.bits.upper()
            progress = stack.enter_context(shown(f"quantizing {name} to {bits}"))
        progress = progress or None
        stages = Stages(progress)
        output = partial = None
        if out is not None:
            output = Output(out, overwrite=overwrite, inputs=_inputs(model, images, config), finished=resume)
            stack.enter_context(output)
            partial = Partial(output.partial, output.target)
            if output.target.exists() and not overwrite and not restart:
                name = "" if isinstance(model, PreTrainedModel) else str(model)
                done = _finished(output, run, name, partial, write_results, started)
                if done is not None:
                    return done
                output.overwrite = True  # it is this run's own, without its results
            if unit_cache is None:
                partial.open(resume=resume, restart=restart)
        store = UnitStore(Path(unit_cache) if unit_cache is not None else None)
        kept = partial if unit_cache is None else None
        if kept is not None:
            store = UnitStore(kept.folder, create=kept.create)
        with _keeping(kept):
            with stages("preparing"):
                reference = reference_model(model, run.device, normalisation, config.image_size)
                sites = find_sites(reference)
                sites.family.compute_in_pieces(reference)
                run.plan = config.bit_plan(sites)
                run.plan.check(sites)
                if config.budget is not None:
                    check_affordable(Budget.parse(config.budget), reference, sites, run.plan)
            if config.decoder_only:
                # No transform changes what methods do not see, so the float encoder stays as it is.
                stack.enter_context((embeddings or Embeddings()).serving(reference))
            data = images
            if not isinstance(images, CalibrationSet):
                # Embeddings are kept on disk where the encoder stays as it is; else for this run.
                keeping = nullcontext([]) if config.decoder_only else remembered(reference)
                with stages("proposals", config.calibration.n_images), keeping as known:
                    settings = asdict(config.calibration)
                    data = data_for(reference, sites, **settings, progress=stages.advance).with_embeddings(known)
            if partial is not None and output is not None:
                if kept is not None:
                    found = ingredients(reference, data, run.method, config, run.device)
                    kept.check(found)
                    kept.begin(found, len(run.method.units(run.treated(sites))))
                check_space(output, reference, sites, run.plan, partial)
            context = RunContext(
                device=run.device,
                seed=config.calibration.seed,
                store=store,
                space=CacheSpace(int(cache_gigabytes * 2**30), device=run.device),
                progress=progress,
                stages=stages,
                hooks=hooks or Hooks(),
            )
            quantized, report = to_integers(reference, sites, run, data, context)
            context.hooks.before_packing(quantized)

            recipe = {
                "carsam_version": __version__,
                "model": "" if isinstance(model, PreTrainedModel) else str(model),
                **config.to_dict(),
                "settings": run.method.to_dict(),
                "calibration_fingerprint": data.fingerprint,
            }
            with stages("packing"), context.hooks.work("pack"):
                packed = pack(quantized, sites)

            def result(model: PreTrainedModel) -> QuantizeResult:
                seconds = time.perf_counter() - started
                peak = peak_memory(run.device)
                return QuantizeResult(model, recipe, report, seconds, peak, data.skipped, dict(stages.seconds))

            if output is None:
                return result(attach(packed, Facts(recipe)))
            with output.replacing() as replacement:
                with stages("packing"), context.hooks.work("write"):
                    write_folder(packed, replacement.folder, recipe)
                    if write_results:
                        write_json(replacement.folder / RESULTS, {"quantization": result(packed).to_dict()})
                    replacement.move()
                with stages("verifying"), context.hooks.work("verify"):
                    loaded = load(output.target, device=run.device)
                    check_equal(packed, loaded, output.path)
        if kept is not None:
            kept.discard()
        return result(loaded)


def _finished(
    output: Output, run: Run, model: str, partial: Partial, write_results: bool, started: float
) -> QuantizeResult | None:
    """The result of a run that was killed after its folder had been moved into place; None if it must be written again.

    Raises:
        CarsamError: The folder that is there has other settings.
    """
    if differing := differing_settings(output.target, run.config, run.method, model):
        raise CarsamError(
            f"{output.path} exists already and is finished, with something else ({', '.join(differing)}); choose "
            "another folder or allow overwriting (--overwrite)."
        )
    packed = load(output.target, device=run.device)
    noted = read_quantization(output.target)
    if noted is None and write_results and partial.is_ours() and partial.units():
        return None
    logger.warning("%s was finished already; nothing is left to do.", output.path)
    partial.discard()
    noted = noted or {}
    skipped, seconds = noted.get("skipped_images"), time.perf_counter() - started
    return QuantizeResult(
        packed,
        read_recipe(output.target),
        finished_report(noted),
        seconds,
        peak_memory(run.device),
        skipped if isinstance(skipped, int) else 0,
    )


def _inputs(model: Any, images: Any, config: QuantizeConfig) -> dict[str, str | Path | None]:
    """What a run reads, which must not be written into."""
    return {
        "model": None if isinstance(model, PreTrainedModel) else model,
        "images": None if isinstance(images, CalibrationSet) else images,
        "COCO file": None if isinstance(images, CalibrationSet) else config.calibration.coco,
    }


@contextmanager
def _keeping(partial: Partial | None) -> Iterator[None]:
    """Adds what is kept to errors and interrupts of a block."""
    try:
        yield
    except CarsamError as error:
        if partial is None or not partial.units() or str(partial.folder) in str(error):
            raise
        raise type(error)(f"{error} {partial.kept()}") from error
    except KeyboardInterrupt as interrupt:
        if partial is not None:
            interrupt.args = (f"interrupted. {partial.kept()}",)
        raise
