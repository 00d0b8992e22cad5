"""One row of evidence: quantized, packed, loaded back, measured with boxes and clicks, and looked into."""

from __future__ import annotations

import copy
import functools
import math
import platform
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from evidence_data import ROOT, Images, Places
from evidence_rows import Row
from transformers import PreTrainedModel

import carsam
from carsam.data.coco.ground_truth import GroundTruth
from carsam.device import resolve_device
from carsam.diagnose.oscillation import oscillation
from carsam.diagnose.pair import Pair, float_form, round_to_nearest
from carsam.diagnose.passes import encode_images, run_passes
from carsam.diagnose.results import AttentionResult, plain
from carsam.evaluate.average_precision import Prediction, average_precision
from carsam.evaluate.coco_metrics import evaluate_coco
from carsam.evaluate.points import evaluate_points
from carsam.evaluate.scores import CocoResult, dice
from carsam.methods.base import create
from carsam.models.family import families, find_sites
from carsam.models.load import load_model
from carsam.pack.checkpoint import folder_size
from carsam.pipeline import QuantizeResult, quantize
from carsam.prompts.calibration import CalibrationSet, calibration_set
from carsam.prompts.diagnosis import diagnosis_images
from carsam.quantizers import simulate
from carsam.run.context import Hooks
from carsam.run.embeddings import Embeddings
from carsam.run.store import code_fingerprint, versions
from carsam.transform.stress import stress

# Of IoU and DSC, which are percent: four decimals of the fraction. The 95 % intervals are a hundred times wider.
PLACES_OF_PERCENT = 2
# Digits of an error or a time.
DIGITS = 5
DIAGNOSED_PROMPTS = 4


@dataclass
class Bench:
    """Models and data by name, kept between rows.

    Attributes:
        places: Where they lie.
        device: Where to compute.
        commit: Of the code, where it is not a git checkout.
    """

    places: Places
    device: str = "cpu"
    commit: str | None = None

    def __post_init__(self):
        resolve_device(self.device)
        self.embeddings = Embeddings()
        self.model = functools.lru_cache(maxsize=2)(self._model)
        self.calibration = functools.lru_cache(maxsize=4)(self._calibration)

    def _model(self, subject: str) -> PreTrainedModel:
        if subject == "litemedsam":
            return load_model(self.places.litemedsam)
        if subject == "sam2":
            return self._images_alone()
        model = load_model(self.places.embedded)
        return model if subject == "embedded" else stress(model, float(subject.removeprefix("twin-")))

    def _images_alone(self) -> PreTrainedModel:
        """The embedded SAM 2 without its memory, as transformers saves it."""
        with tempfile.TemporaryDirectory(prefix="carsam-evidence-") as folder:
            families()["sam2"].model_class.from_pretrained(self.places.embedded_sam2).save_pretrained(folder)
            return load_model(folder)

    def _calibration(self, subject: str, coco: Path, images: Path, count: int, boxes: int, seed: int) -> CalibrationSet:
        settings = {"n_images": count, "boxes_per_image": boxes, "seed": seed}
        return calibration_set(self.model(subject), images, coco=coco, **settings)

    def calibration_of(self, row: Row) -> CalibrationSet:
        """The images that a row's quantization sees."""
        data, _ = self.places.calibration_and_evaluation(row.base_data, row.held_out)
        return self.calibration(row.subject, data.coco, data.images, row.images, row.boxes, row.seed)

    def run(self, row: Row) -> dict[str, Any]:
        """Quantizes and measures.

        Returns:
            Everything that ``docs/results`` keeps of the row.

        Raises:
            CarsamError: Anything the user can fix.
        """
        started = time.perf_counter()
        model = self.model(row.subject)
        _, evaluation = self.places.calibration_and_evaluation(row.base_data, row.held_out)
        found: dict[str, Any] = {"row": row.to_dict(), "notes": row.notes}
        if row.is_float:
            found["bytes"] = 2 * sum(value.numel() for value in model.parameters())
            self._measure(model, row, evaluation, found, started)
        else:
            with tempfile.TemporaryDirectory(prefix="carsam-evidence-") as folder:
                shared: list[str] = []
                result = quantize(
                    model,
                    self.calibration_of(row),
                    row.config(),
                    out=Path(folder) / "packed",
                    device=self.device,
                    unit_cache=self.places.work / "units",
                    embeddings=self.embeddings,
                    hooks=Hooks(unit_found=shared.append),
                )
                found["bytes"] = folder_size(Path(folder) / "packed")
            found["quantization"] = quantization_of(result, shared)
            self._measure(result.model, row, evaluation, found, time.perf_counter())
            if row.diagnose:
                began = time.perf_counter()
                found["diagnosis"] = diagnosis_of(model, result.model, row, evaluation, self.device)
                found["seconds"]["diagnose"] = round(time.perf_counter() - began, 1)
        found["seconds"]["all"] = round(time.perf_counter() - started, 1)
        found["made"] = made(self.device, self.commit)
        return found

    def _measure(self, model: PreTrainedModel, row: Row, data: Images, found: dict[str, Any], started: float) -> None:
        """Adds the scores with boxes and with clicks, and the seconds of both."""
        sources = data.sources()
        by_source: dict[str, float | None] = {}

        def predicted(truth: GroundTruth, predictions: Sequence[Prediction]) -> None:
            by_source.update(precision_by_source(truth, predictions, sources))

        # A quantized encoder's embeddings are nobody else's.
        embeddings = self.embeddings if row.is_float or row.scope == "decoder" else None
        common = {"device": self.device, "limit": row.limit, "embeddings": embeddings}
        result = evaluate_coco(model, data.coco, data.images, predicted=predicted, **common)
        found["scores"] = scores_of(result, sources, by_source)
        found["seconds"] = {"boxes": round(time.perf_counter() - started, 1)}
        if row.clicks:
            began = time.perf_counter()
            points = evaluate_points(model, data.coco, data.images, clicks=row.clicks, **common)
            found["points"] = {
                "mean_iou": {str(n): round(iou, PLACES_OF_PERCENT) for n, iou in points.mean_iou.items()},
                "per_image": [
                    {
                        "name": score.name,
                        "n": score.n_objects,
                        "ious": [round(iou, PLACES_OF_PERCENT) for iou in score.mean_iou.values()],
                    }
                    for score in points.per_image
                ],
            }
            found["seconds"]["clicks"] = round(time.perf_counter() - began, 1)


def scores_of(result: CocoResult, sources: Mapping[str, str], precision: Mapping[str, float | None]) -> dict[str, Any]:
    """Scores of an evaluation with boxes, image by image and by modality, in percent.

    Args:
        result: The evaluation.
        sources: Modality by file name; may be empty.
        precision: Segm AP by modality.
    """
    per_image, groups = [], {}
    for score in result.per_image:
        source = sources.get(score.name)
        entry = {"name": score.name, "ious": [round(iou, PLACES_OF_PERCENT) for iou in score.ious]}
        per_image.append(entry if source is None else {**entry, "source": source})
        if source is not None:
            groups.setdefault(source, []).extend(score.ious)
    every = [iou for score in result.per_image for iou in score.ious]
    found: dict[str, Any] = {
        **{name: _rounded(getattr(result, name)) for name in ("segm_ap", "segm_ap50", "segm_ap75", "box_ap")},
        **_means(every),
        "n_images": result.n_images,
        "n_prompts": result.n_prompts,
    }
    if groups:
        found["sources"] = {
            name: {"segm_ap": _rounded(precision.get(name)), **_means(ious), "n_prompts": len(ious)}
            for name, ious in sorted(groups.items())
        }
    return {**found, "per_image": per_image}


def _means(ious: Sequence[float]) -> dict[str, float | None]:
    if not ious:
        return {"mean_iou": None, "dsc": None}
    means = {"mean_iou": sum(ious) / len(ious), "dsc": sum(map(dice, ious)) / len(ious)}
    return {name: round(value, 3) for name, value in means.items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def precision_by_source(
    truth: GroundTruth, predictions: Sequence[Prediction], sources: Mapping[str, str]
) -> dict[str, float | None]:
    """Segm AP over the images of each modality."""
    of_image = [sources.get(image.file_name) for image in truth.images]
    found = {}
    for source in sorted({each for each in of_image if each is not None}):
        objects = (item for items in truth.objects for item in items if of_image[item.image] == source)
        masks = (each for each in predictions if of_image[each.image] == source)
        found[source] = average_precision(objects, masks).values["segm_ap"]
    return found


def quantization_of(result: QuantizeResult, shared: Sequence[str]) -> dict[str, Any]:
    """What is kept of a quantization: seconds, errors of units, compensations.

    Args:
        result: The quantization.
        shared: Units that came from another row, whose seconds are those of that row.
    """
    units = []
    for unit in result.report.units:
        values = {key: value for key, value in asdict(unit).items() if key != "losses"}
        units.append(compact(values) | ({"from_another_row": True} if unit.unit in shared else {}))
    return {
        "seconds": round(result.seconds, 1),
        "stages": {name: round(seconds, 1) for name, seconds in result.stages.items()},
        "peak_memory": result.peak_memory,
        "skipped_images": result.skipped_images,
        "units": units,
        "compensations": [compact(asdict(item)) for item in result.report.compensations],
        "transforms": compact(result.report.transforms),
        **({"masks": compact(asdict(result.report.masks))} if result.report.masks is not None else {}),
    }


def compact(value: Any) -> Any:
    """Plain values whose floats keep a few digits; what is not finite becomes None."""
    if isinstance(value, dict):
        return {key: compact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [compact(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def diagnosis_of(
    floating: PreTrainedModel, packed: PreTrainedModel, row: Row, data: Images, device: str
) -> dict[str, Any]:
    """Dissipation of the decoder's attentions and the error along the decoder (METHOD.md, 10).

    Args:
        floating: The float model.
        packed: Loaded back from its folder.
        row: Its settings; ``row.diagnose`` images are looked at.
        data: The evaluation set.
        device: Where to compute.
    """
    source = copy.deepcopy(floating).eval().requires_grad_(False).to(resolve_device(device))
    sites = find_sites(source)
    method = create(row.method, row.config().settings)
    pair = Pair(source, float_form(source, sites), packed.to(device), sites, method, row.scope == "decoder")
    samples = diagnosis_images(source, data.images, coco=data.coco, limit=row.diagnose, prompts=DIAGNOSED_PROMPTS)
    passes = run_passes(pair, samples)
    _, rounded = round_to_nearest(pair, CalibrationSet.of(samples))
    with simulate(weights=True, activations=True):
        nearest = encode_images(rounded, pair, samples)
    course = oscillation(pair, rounded, [sample.boxes for sample in samples], (*passes.embeddings, nearest))
    return {
        "n_images": len(samples),
        "n_prompts": sum(len(sample.boxes) for sample in samples),
        "attentions": [_attention(each) for each in passes.attentions if each.stage == "decoder"],
        "oscillation": compact(plain(course)),
    }


def _attention(result: AttentionResult) -> dict[str, Any]:
    """The means over heads, and for each measure a list of the heads' own."""
    values = result.to_dict()
    heads = values.pop("heads")
    return compact({**values, "heads": {name: [head[name] for head in heads] for name in heads[0]}})


@functools.cache
def made(device: str, commit: str | None) -> dict[str, Any]:
    """What made a row: commit, machine, versions."""
    graphics = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else None
    return {
        "commit": commit or commit_of(ROOT),
        "code": code_fingerprint(scores=True)[:12],
        "carsam": carsam.__version__,
        "device": graphics or processor(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions("pycocotools"),
    }


def commit_of(folder: Path) -> str:
    """The commit of a checkout, with ``+`` where sources differ from it; ``unknown`` where it is none."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=10", "HEAD")
    if commit is None:
        return "unknown"
    return commit + ("+" if git("status", "--porcelain", "--untracked-files=no", "carsam", "benchmarks") else "")


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
