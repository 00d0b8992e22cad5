"""A model measured: quantized into a folder, loaded back and evaluated, with sizes, times and memory.

Comparisons and showcases both stand on this: whatever is scored is what its packed folder gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from carsam.config import QuantizeConfig
from carsam.evaluate.coco_metrics import Progress as ImageProgress
from carsam.evaluate.coco_metrics import evaluate_coco
from carsam.evaluate.journal import Journals
from carsam.evaluate.scores import CocoResult
from carsam.output.finished import read_quantization
from carsam.pack.checkpoint import folder_size
from carsam.pipeline import QuantizeResult, quantize
from carsam.prompts.calibration import CalibrationSet
from carsam.run.context import Hooks, Progress
from carsam.run.embeddings import Embeddings
from carsam.run.memory import peak_memory


@dataclass(frozen=True)
class EvaluationData:
    """What models are measured on, with the objects' own boxes as prompts.

    Attributes:
        coco: COCO instances file.
        images: Folder that its file names are relative to.
        limit: Only the file's first images.
    """

    coco: str | Path
    images: str | Path
    limit: int | None = None


@dataclass(frozen=True)
class Watch:
    """Who is told how far the work is.

    Attributes:
        quantizing: Entered around the quantization; yields what :func:`carsam.quantize` takes as ``progress``.
        evaluating: Entered around the evaluation; yields what is called with (images done, images).
    """

    quantizing: Callable[[], AbstractContextManager[Progress | None]] = nullcontext
    evaluating: Callable[[], AbstractContextManager[ImageProgress | None]] = nullcontext


@dataclass(frozen=True)
class Measured:
    """A model with its measurements.

    Attributes:
        model: The model; a packed one is the one loaded back from its folder.
        scores: Of the evaluation, image by image too.
        file_bytes: Size of its weights file.
        evaluate_seconds: Wall-clock time of the evaluation; None where images of an interrupted one were taken over,
            or kept image embeddings.
        peak_memory: Of the process in bytes: up to the end of the quantization, or else of the evaluation.
        quantization: What ``results.json`` notes of it; None for a float model. Its ``seconds`` are those of all its
            units, also of those that came from an interrupted run or from another row of a comparison.
    """

    model: PreTrainedModel = field(repr=False)
    scores: CocoResult
    file_bytes: int
    evaluate_seconds: float | None
    peak_memory: int
    quantization: dict[str, Any] | None = None


def measure(
    model: PreTrainedModel,
    data: EvaluationData,
    file_bytes: int,
    *,
    quantization: dict[str, Any] | None = None,
    device: str | torch.device | None = None,
    watch: Watch | None = None,
    journals: Journals | None = None,
    embeddings: Embeddings | None = None,
) -> Measured:
    """Evaluates a model.

    Args:
        model: Float or packed.
        data: What to measure on.
        file_bytes: Size of its weights file.
        quantization: Where it is packed, what is noted of that.
        device: Where to evaluate; None leaves the model where it is.
        watch: Told how far it is.
        journals: Where finished images are kept and taken from; None keeps nothing.
        embeddings: Where image embeddings are kept and taken from; None computes them.

    Raises:
        CarsamError: The model, the images or the annotations are damaged.
    """
    watch = watch or Watch()
    started, found = time.perf_counter(), embeddings.found if embeddings is not None else 0
    with watch.evaluating() as progress:
        scores = evaluate_coco(
            model,
            data.coco,
            data.images,
            device=device,
            limit=data.limit,
            progress=progress,
            journals=journals,
            embeddings=embeddings,
        )
    seconds: float | None = time.perf_counter() - started
    # A time of less than the whole work would be taken for the model's.
    if (journals is not None and journals.taken_over) or (embeddings is not None and embeddings.found > found):
        seconds = None
    peak = peak_memory() if quantization is None else quantization["peak_memory_bytes"]
    return Measured(model, scores, file_bytes, seconds, peak, quantization)


def quantize_and_measure(
    model: PreTrainedModel | str | Path,
    calibration: str | Path | CalibrationSet,
    config: QuantizeConfig,
    data: EvaluationData,
    out: Path,
    *,
    evaluation_device: str | torch.device | None = None,
    watch: Watch | None = None,
    journals: Journals | None = None,
    embeddings: Embeddings | None = None,
    **options: Any,
) -> Measured:
    """Quantizes a model into a folder, loads it back and evaluates it.

    Args:
        model: The float model.
        calibration: Calibration images.
        config: Method, bits and data settings.
        data: What to measure on.
        out: The packed folder; it stays.
        evaluation_device: Where to evaluate; None is where the quantization ran.
        watch: Told how far it is.
        journals: Where the evaluation's finished images are kept and taken from.
        embeddings: Where image embeddings are kept and taken from if only the decoder is quantized; those of another
            quantized model are nobody else's.
        options: Others of :func:`carsam.quantize`.

    Raises:
        CarsamError: Anything the user can fix.
    """
    watch = watch or Watch()
    earlier = read_quantization(out)
    found: list[str] = []
    embeddings = embeddings if config.decoder_only else None
    with watch.quantizing() as progress:
        result = quantize(
            model,
            calibration,
            config,
            out=out,
            progress=progress,
            hooks=Hooks(unit_found=found.append),
            embeddings=embeddings,
            **options,
        )
    return measure(
        result.model,
        data,
        folder_size(out),
        quantization=_noted(result, found, earlier),
        device=evaluation_device,
        watch=watch,
        journals=journals,
        embeddings=embeddings,
    )


def _noted(result: QuantizeResult, found: list[str], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """What to note of a quantization, part of which may have been done before.

    Args:
        result: Of this call.
        found: Units that it took from the store.
        earlier: What was noted in the folder before the call.
    """
    noted = result.to_dict()
    if not result.stages and earlier is not None and "peak_memory_bytes" in earlier:
        return {**noted, **earlier}  # the folder was finished before; this call only loaded it
    before = sum(unit.seconds for unit in result.report.units if unit.unit in found)
    return {**noted, "seconds": round(result.seconds + before, 1)}
