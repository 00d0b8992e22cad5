"""COCO evaluation of box prompts (METHOD.md, 11): segm AP, box AP, mean IoU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pycocotools import mask as mask_utils
from torch import Tensor
from transformers import PreTrainedModel

from carsam.data.coco.annotations import Rle
from carsam.data.coco.ground_truth import GroundTruth
from carsam.data.images.transforms import Preprocessor
from carsam.device import resolve_device
from carsam.errors import CheckpointError, ConfigError, DataError, DeviceError
from carsam.evaluate.average_precision import OFFICIAL_CAP, Precision, Prediction, average_precision
from carsam.evaluate.intervals import mean_interval
from carsam.evaluate.journal import Journal, Journals, evaluation_parts
from carsam.evaluate.scores import CocoResult, ImageScore, few_objects_note, score_text
from carsam.predict.predictor import encode_image, predict_logits
from carsam.prompts.evaluation import box_prompts, evaluation_image
from carsam.prompts.image import PROMPTS_PER_BATCH, PromptedImage

if TYPE_CHECKING:
    from carsam.run.embeddings import Embeddings

Progress = Callable[[int, int], None]


def evaluate_coco(
    model: PreTrainedModel,
    coco_file: str | Path,
    image_folder: str | Path,
    *,
    detections: str | Path | None = None,
    device: str | torch.device | None = None,
    limit: int | None = None,
    prompts_per_batch: int = PROMPTS_PER_BATCH,
    progress: Progress | None = None,
    journals: Journals | None = None,
    embeddings: Embeddings | None = None,
    predicted: Callable[[GroundTruth, Sequence[Prediction]], None] | None = None,
) -> CocoResult:
    """Prompts a model with boxes and scores its single-mask output as pycocotools does.

    Masks are the logits resized to the original image and cut at 0; a mask's score is its predicted IoU, times the
    detection's score where prompts are detections. Crowds are no prompts but stay in the ground truth. Boxes are
    clipped to the image; those without area inside it are dropped with a logged warning (their objects count as
    missed). Images without prompts count. All files are checked before the first prediction.

    Args:
        model: Float or quantized.
        coco_file: Ground truth, COCO instances.
        image_folder: Folder that the file names are relative to.
        detections: COCO detection results to use as prompts, in place of the ground-truth boxes.
        device: Where to run; the model goes back to its device afterwards. None leaves it where it is.
        limit: Only the file's first images.
        prompts_per_batch: Prompts decoded at once.
        progress: Called with (images done, images) after each image.
        journals: Where finished images are kept and taken from; None keeps nothing.
        embeddings: Where image embeddings are kept and taken from; None computes them. The scores are the same.
        predicted: Given the ground truth and all masks at the end, for scores of the caller's own.

    Raises:
        ConfigError: ``prompts_per_batch`` is below 1.
        CheckpointError: The model gives values that are not finite.
        DataError: A file is missing or not valid, images are missing, or there is nothing to evaluate.
        DeviceError: The device is not available.
    """
    if prompts_per_batch < 1:
        raise ConfigError(f"prompts_per_batch must be at least 1, not {prompts_per_batch}.")
    truth = GroundTruth.from_file(coco_file, image_folder, limit)
    prompts = box_prompts(truth, detections)
    preprocess = Preprocessor.for_model(model)

    def predict(index: int) -> list[tuple[Rle, float]]:
        image = evaluation_image(truth, index, prompts[index], preprocess)
        return box_masks(model, image, preprocess.image_size, prompts_per_batch)

    predictions: list[Prediction] = []
    scores: list[ImageScore] = []
    with evaluating(model, device), embeddings.serving(model) if embeddings else contextlib.nullcontext():
        journal = None
        if journals is not None:
            files = {"annotation file": coco_file, "detections": detections}
            settings = {"limit": limit, "prompts_per_batch": prompts_per_batch}
            parts = evaluation_parts(model, "boxes", files, preprocessing=str(preprocess), **settings)
            journal = journals.open(parts, len(truth.images))
        for index, image in enumerate(truth.images):
            with naming_what_is_kept(journal):
                masks = _kept_or_predicted(journal, truth, index, predict) if prompts[index] else []
            ious = []
            for prompt, (mask, score) in zip(prompts[index], masks):
                targets = [prompt.target] if prompt.target else _masks_of(truth, index, prompt.category)
                ious.append(100 * best_iou(mask, targets))
                predictions.append(Prediction(index, prompt.category, mask, score * prompt.score))
            scores.append(ImageScore(image.file_name, float(np.mean(ious)) if ious else None, tuple(ious)))
            if progress is not None:
                progress(index + 1, len(truth.images))
    if predicted is not None:
        predicted(truth, predictions)
    return _result(truth, scores, average_precision((o for objects in truth.objects for o in objects), predictions))


def _result(truth: GroundTruth, scores: list[ImageScore], precision: Precision) -> CocoResult:
    ious = [iou for score in scores for iou in score.ious]
    notes = [few_objects_note(truth.n_objects)]
    values, capped = precision.values, precision.capped
    if capped is not None and capped != {name: values[name] for name in capped}:
        notes.append(
            f"All masks count. With COCO's cap of {OFFICIAL_CAP} a class and image, segm AP would be "
            f"{score_text(capped['segm_ap'])} and box AP {score_text(capped['box_ap'])}."
        )
    return CocoResult(
        **values,
        mean_iou=float(np.mean(ious)),
        n_images=len(scores),
        n_prompts=len(ious),
        per_image=tuple(scores),
        mean_iou_interval=mean_interval(score.ious for score in scores),
        n_objects=truth.n_objects,
        notes=tuple(note for note in notes if note),
    )


@contextlib.contextmanager
def evaluating(model: PreTrainedModel, device: str | torch.device | None = None) -> Iterator[None]:
    """Evaluation mode, on ``device``, without gradients; mode and device are as before afterwards.

    Raises:
        DeviceError: The device is not available, or its memory is too small.
    """
    home, training = model.device, model.training
    try:
        target = home if device is None else resolve_device(device)
        if target != home:
            model.to(target)
    except (RuntimeError, AssertionError) as error:
        # torch tells a missing CUDA by either, depending on how it was built.
        raise DeviceError(f"the device {device!s} is not available: {str(error).splitlines()[0]}") from error
    model.eval()
    try:
        with torch.no_grad():
            yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"the device {model.device} has too little free memory for this model and image; end what else runs there, "
            "or use another device (--device cpu)."
        ) from error
    finally:
        model.train(training)
        if target != home:
            model.to(home)


@contextlib.contextmanager
def naming_what_is_kept(journal: Journal | None) -> Iterator[None]:
    """Adds to an error in the middle of an evaluation how many images are kept."""
    try:
        yield
    except DataError as error:
        if journal is None or not journal.n_kept:
            raise
        raise DataError(
            f"{error} {journal.n_kept} of {journal.n_images} images are kept; fix this one and run the same command "
            "again to go on."
        ) from error


def require_finite(name: str, *outputs: Tensor) -> None:
    """Refuses outputs that would turn into a score that means nothing.

    Raises:
        CheckpointError: A value is NaN or infinite.
    """
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise CheckpointError(
            f"the model gives values that are not finite for the image {name}; its weights are damaged, or too large "
            "for their number format. Try another image with carsam predict; if it fails too, get the model again."
        )


def box_masks(
    model: PreTrainedModel, image: PromptedImage, image_size: int, prompts_per_batch: int
) -> list[tuple[Rle, float]]:
    """One mask and its predicted IoU for each box of an image.

    Args:
        model: Float or quantized.
        image: With its boxes and geometry.
        image_size: Side of the input frame in pixels.
        prompts_per_batch: Boxes decoded at once.

    Raises:
        CheckpointError: The model gives values that are not finite.
    """
    embeddings = encode_image(model, image.pixel_values)
    masks = []
    for boxes in image.boxes.split(prompts_per_batch):
        low_res, iou = predict_logits(model, embeddings, boxes=boxes)
        require_finite(image.name, low_res, iou)
        # One mask at a time: a batch of logits at the size of a photograph would not fit in memory.
        for logits, score in zip(low_res[:, 0], iou[:, 0]):
            masks.append((mask_to_rle(image.geometry.masks_to_original(logits, image_size) > 0), float(score)))
    return masks


def mask_to_rle(mask: Tensor) -> Rle:
    """A mask ``(H, W)`` as compressed RLE."""
    rle = mask_utils.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"]}


def best_iou(rle: Rle, targets: list[Rle]) -> float:
    """Largest IoU (0..1) of a mask with any target; 0 without targets."""
    return float(mask_utils.iou([rle], targets, [0] * len(targets)).max()) if targets else 0.0


def _masks_of(truth: GroundTruth, index: int, category: int) -> list[Rle]:
    return [item.mask for item in truth.singles(index) if item.category == category]


def _kept_or_predicted(
    journal: Journal | None, truth: GroundTruth, index: int, predict: Callable[[int], list[tuple[Rle, float]]]
) -> list[tuple[Rle, float]]:
    """Mask and predicted IoU of each of an image's prompts, from the journal where it has them."""
    path, size = truth.image_path(index), list(truth.images[index].size)
    kept = journal.get(index, path) if journal is not None else None
    if kept is not None:
        return [({"size": size, "counts": counts.encode("ascii")}, score) for counts, score in kept]
    masks = predict(index)
    if journal is not None:
        journal.add(index, path, [[mask["counts"].decode("ascii"), score] for mask, score in masks])
    return masks
