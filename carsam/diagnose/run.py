"""The story of a diagnosis: one pass of both models, nearest rounding, oscillation, sensitivity, pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from carsam.device import resolve_device
from carsam.diagnose.examples import choose, draw, score
from carsam.diagnose.folder import FOLDER, check_target, write_folder
from carsam.diagnose.oscillation import oscillation
from carsam.diagnose.pair import open_pair, round_to_nearest
from carsam.diagnose.passes import encode_images, run_passes
from carsam.diagnose.pictures import QUALITY
from carsam.diagnose.results import Diagnosis
from carsam.diagnose.sensitivity import MAX_IMAGES, sensitivity
from carsam.diagnose.site_values import weight_results
from carsam.errors import CheckpointError
from carsam.pack.source import packed_folder
from carsam.prompts.calibration import CalibrationSet
from carsam.prompts.diagnosis import FLOAT_MASKS, GROUND_TRUTH, diagnosis_images
from carsam.quantizers import simulate

Progress = Callable[[str, str, int, int], None]
"""Called as ``progress(stage, noun, done, total)``: ``("sensitivity", "site", 12, 192)``."""

N_IMAGES, N_PROMPTS = 8, 4
_UNIT_KEYS = ("unit", "steps", "losses", "before", "after", "seconds")


def diagnose(
    float_model: str | Path,
    quantized: str | Path,
    images: str | Path,
    *,
    coco: str | Path | None = None,
    limit: int = N_IMAGES,
    prompts: int = N_PROMPTS,
    out: str | Path | None = None,
    with_sensitivity: bool = True,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    normalise: str | None = None,
) -> tuple[Diagnosis, Path]:
    """Finds where a packed model departs from its float original.

    Args:
        float_model: The float model, as for ``carsam quantize``.
        quantized: The packed folder that was made from it.
        images: Folder of images.
        coco: COCO file of those images: its boxes are the prompts, its masks the reference.
        limit: Images to use.
        prompts: Box prompts of an image at most.
        out: Folder to write; ``diagnosis`` in the packed folder if None. An earlier diagnosis there is replaced.
        with_sensitivity: Also round every site alone.
        device: ``cpu``, ``cuda`` or ``auto``.
        progress: Called as work goes on.
        normalise: ``imagenet``, ``unit`` or ``min-max`` for both models; the packed model's own without it.

    Returns:
        The diagnosis, and the folder that holds it.

    Raises:
        CarsamError: Anything the user can fix: models that do not belong together, no images, a full disk.
    """
    advance = progress or (lambda *_: None)

    def report(stage: str, noun: str) -> Callable[[int, int], None]:
        return lambda done, total: advance(stage, noun, done, total)

    if out is None and not Path(quantized).exists() and packed_folder(quantized) is not None:
        raise CheckpointError(f"{quantized} is a model of the Hub; name a folder for its diagnosis with --out.")
    target = Path(out) if out is not None else Path(quantized) / FOLDER
    device = resolve_device(device)
    pair = open_pair(float_model, quantized, device, normalise)
    check_target(target)
    image_size = pair.sites.family.image_size(pair.source)

    samples = diagnosis_images(pair.source, images, coco=coco, limit=limit, prompts=prompts)
    passes = run_passes(pair, samples, report("comparing both models", "image"))
    scored = [score(sample, outcome, image_size) for sample, outcome in zip(samples, passes.outcomes)]

    base, rounded = round_to_nearest(pair, CalibrationSet.of(samples), report("rounding to nearest", "image"))
    sensitivities = ()
    if with_sensitivity:
        sensitivities = sensitivity(
            base, rounded, pair.sites, samples[:MAX_IMAGES], report("trying sites one by one", "site")
        )
    # Last: it puts parts of the packed model into the rounded one.
    with simulate(weights=True, activations=True):
        nearest = encode_images(rounded, pair, samples)
    boxes = [sample.boxes for sample in samples]
    course = oscillation(pair, rounded, boxes, (*passes.embeddings, nearest), report("walking the decoder", "moment"))

    examples, heat_maps, pictures = draw(choose(scored), image_size)
    scores = [prompt for each in scored for prompt in each.prompts]
    packing = pair.packed.config.quantization_config
    diagnosis = Diagnosis(
        float_=str(float_model),
        quantized=str(quantized),
        method=packing.method,
        bits=packing.bits,
        n_images=len(samples),
        n_prompts=len(scores),
        reference=GROUND_TRUTH if coco is not None else FLOAT_MASKS,
        mean_iou_float=float(np.mean([prompt.iou_float for prompt in scores])),
        mean_iou_quantized=float(np.mean([prompt.iou_quantized for prompt in scores])),
        attentions=passes.attentions,
        heat_maps=heat_maps,
        oscillation=course,
        units=reconstruction_units(packed_folder(quantized) or Path(quantized)),
        sites=passes.sites,
        weights=weight_results(pair),
        sensitivity=sensitivities,
        examples=examples,
    )
    write_folder(target, diagnosis, pictures, QUALITY)
    return diagnosis, target


def reconstruction_units(folder: Path) -> tuple[dict[str, Any], ...]:
    """The units' reports in a packed folder's ``results.json``; none where it does not have them."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        units = results["quantization"]["units"]
        return tuple({key: unit[key] for key in _UNIT_KEYS} for unit in units)
    except (OSError, ValueError, KeyError, TypeError):
        return ()
