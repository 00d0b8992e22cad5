"""COCO evaluation of box prompts (METHOD.md, 11): segm AP, box AP, mean IoU."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from transformers import SamModel

from carsam.data.coco import CocoImage, CocoInstances, Detection, Rle, clip_boxes, load_detections, xywh_to_xyxy
from carsam.data.transforms import Geometry, Preprocessor
from carsam.errors import ConfigError, DataError, DeviceError
from carsam.files import write_json
from carsam.models.load import resolve_device
from carsam.predictor import encode_image, predict_logits

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImageScore:
    """One image's result.

    Attributes:
        name: File name.
        mean_iou: Percent, over the image's prompts; None without prompts.
        ious: Percent, per prompt, in the order of the file.
    """

    name: str
    mean_iou: float | None
    ious: tuple[float, ...]


@dataclass(frozen=True)
class CocoResult:
    """Scores over a data set, all in percent.

    Attributes:
        segm_ap: AP of the masks, IoU 0.50:0.95.
        box_ap: AP of the masks' tight boxes.
        mean_iou: Over all prompts. With ground-truth boxes, a mask against its own object; with detections, against
            the best-overlapping object of the same category (0 where there is none).
        n_images: Images evaluated, also those without prompts.
        n_prompts: Box prompts.
        per_image: In the order of the file.
    """

    segm_ap: float
    box_ap: float
    mean_iou: float
    n_images: int
    n_prompts: int
    per_image: tuple[ImageScore, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings and lists, for JSON."""
        return {**asdict(self), "per_image": [asdict(score) for score in self.per_image]}

    def save(self, path: str | Path) -> None:
        """Writes JSON; an existing file is replaced at once or not at all."""
        write_json(path, self.to_dict())

    def __str__(self) -> str:
        return (
            f"segm AP {self.segm_ap:.1f}, box AP {self.box_ap:.1f}, mean IoU {self.mean_iou:.1f} "
            f"({self.n_prompts} box prompts, {self.n_images} images)"
        )


@dataclass(frozen=True)
class _Prompt:
    """A box prompt: XYXY in pixels of the image, what it is of, and its detection score (1 for ground truth)."""

    box: np.ndarray
    category_id: int
    score: float
    target: Rle | None


def evaluate_coco(
    model: SamModel,
    coco_file: str | Path,
    image_folder: str | Path,
    *,
    detections: str | Path | None = None,
    device: str | torch.device | None = None,
    limit: int | None = None,
    prompts_per_batch: int = 16,
    progress: Progress | None = None,
) -> CocoResult:
    """Prompts a model with boxes and scores its single-mask output as pycocotools does.

    Masks are the logits resized to the original image and cut at 0; a mask's score is its predicted IoU, times the
    detection's score where prompts are detections. Crowds are no prompts but stay in the ground truth. Boxes are
    clipped to the image; those without area inside it are dropped with a logged warning (their objects count as
    missed). Images without prompts count.

    Args:
        model: Float or quantized.
        coco_file: Ground truth, COCO instances.
        image_folder: Folder that the file names are relative to.
        detections: COCO detection results to use as prompts, in place of the ground-truth boxes.
        device: Where to run; the model goes back to its device afterwards. None leaves it where it is.
        limit: Only the file's first images.
        prompts_per_batch: Prompts decoded at once.
        progress: Called with (images done, images) after each image.

    Raises:
        ConfigError: ``prompts_per_batch`` is below 1.
        DataError: A file is missing or not valid, images are missing, or there is nothing to evaluate.
        DeviceError: The device is not available.
    """
    if prompts_per_batch < 1:
        raise ConfigError(f"prompts_per_batch must be at least 1, not {prompts_per_batch}.")
    instances = CocoInstances.from_file(coco_file)
    images = images_to_evaluate(instances, image_folder, limit)
    if not any(instances.instances(image.id) for image in images):
        raise DataError(f"{coco_file} has no objects (other than crowds) in its {len(images)} images to evaluate.")
    if detections is None:
        prompts = {image.id: _ground_truth_prompts(instances, image) for image in images}
    else:
        prompts = _detection_prompts(load_detections(detections), images, detections)
    prompts = {image.id: _valid_prompts(prompts[image.id], image) for image in images}
    if not any(prompts.values()):
        raise DataError(f"no box prompt for the images of {detections or coco_file} has an area inside its image.")

    results: list[dict[str, Any]] = []
    scores: list[ImageScore] = []
    preprocess = Preprocessor.for_model(model)
    with evaluating(model, device):
        for done, image in enumerate(images, 1):
            ious = []
            masks = _predict(model, preprocess, instances, image, image_folder, prompts[image.id], prompts_per_batch)
            truth = [(a["category_id"], instances.rle(a, image)) for a in instances.instances(image.id)]
            for prompt, (rle, predicted_iou) in zip(prompts[image.id], masks):
                targets = [prompt.target] if prompt.target else [t for c, t in truth if c == prompt.category_id]
                ious.append(100 * best_iou(rle, targets))
                results.append(
                    {
                        "image_id": image.id,
                        "category_id": prompt.category_id,
                        "segmentation": rle,
                        "score": predicted_iou * prompt.score,
                    }
                )
            scores.append(ImageScore(image.file_name, float(np.mean(ious)) if ious else None, tuple(ious)))
            if progress is not None:
                progress(done, len(images))

    segm_ap, box_ap = average_precision(instances, images, results)
    all_ious = [iou for score in scores for iou in score.ious]
    return CocoResult(segm_ap, box_ap, float(np.mean(all_ious)), len(images), len(all_ious), tuple(scores))


def images_to_evaluate(instances: CocoInstances, folder: str | Path, limit: int | None) -> tuple[CocoImage, ...]:
    """The images of an evaluation, all of which must exist: scores over what happens to be there mean nothing.

    Raises:
        DataError: The folder or images in it are missing, or no image is left.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} images leaves nothing to evaluate; give at least 1.")
    images = instances.images[:limit]
    if not images:
        raise DataError(f"{instances.path} lists no images.")
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no image folder {folder}.")
    missing = [image.file_name for image in images if not (folder / image.file_name).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(images)} images that {instances.path} names are not in {folder} "
            f"(first: {missing[0]}); give the folder that the file names are relative to."
        )
    return images


@contextlib.contextmanager
def evaluating(model: SamModel, device: str | torch.device | None = None) -> Iterator[None]:
    """Evaluation mode, on ``device``, without gradients; mode and device are as before afterwards.

    Raises:
        DeviceError: The device is not available.
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
    finally:
        model.train(training)
        if target != home:
            model.to(home)


def average_precision(
    instances: CocoInstances, images: tuple[CocoImage, ...], results: list[dict[str, Any]]
) -> tuple[float, float]:
    """Segm AP and box AP (of the masks' tight boxes) by pycocotools, in percent.

    Args:
        instances: Ground truth, crowds included.
        images: The images to count.
        results: ``{image_id, category_id, segmentation (RLE), score}`` entries, not empty.
    """
    annotations = []
    for image in images:
        for annotation in instances.annotations[image.id]:
            rle = instances.rle(annotation, image)
            entry = {
                "area": float(mask_utils.area(rle)),
                "iscrowd": 0,
                **annotation,
                # pycocotools takes a match with annotation id 0 for no match.
                "id": len(annotations) + 1,
                "segmentation": rle,
            }
            annotations.append(entry)
    boxes = [
        {key: r[key] for key in ("image_id", "category_id", "score")}
        | {"bbox": mask_utils.toBbox(r["segmentation"]).tolist()}
        for r in results
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [asdict(image) for image in images],
            "annotations": annotations,
            "categories": list(instances.categories),
        }
        truth.createIndex()
        scores = []
        for kind, entries in (("segm", results), ("bbox", boxes)):
            # loadRes adds keys to the entries it is given.
            evaluation = COCOeval(truth, truth.loadRes([dict(e) for e in entries]), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            scores.append(100 * float(evaluation.stats[0]))
    return scores[0], scores[1]


def mask_to_rle(mask: Tensor) -> Rle:
    """A mask ``(H, W)`` as compressed RLE."""
    rle = mask_utils.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"]}


def best_iou(rle: Rle, targets: list[Rle]) -> float:
    """Largest IoU (0..1) of a mask with any target; 0 without targets."""
    return float(mask_utils.iou([rle], targets, [0] * len(targets)).max()) if targets else 0.0


def _ground_truth_prompts(instances: CocoInstances, image: CocoImage) -> list[_Prompt]:
    annotations = instances.instances(image.id)
    boxes = instances.boxes(image.id)
    return [
        _Prompt(box, annotation["category_id"], 1.0, instances.rle(annotation, image))
        for box, annotation in zip(boxes, annotations)
    ]


def _detection_prompts(
    detections: tuple[Detection, ...], images: tuple[CocoImage, ...], path: str | Path
) -> dict[int, list[_Prompt]]:
    prompts: dict[int, list[_Prompt]] = {image.id: [] for image in images}
    for d in detections:
        if d.image_id in prompts:
            prompts[d.image_id].append(_Prompt(xywh_to_xyxy([d.bbox])[0], d.category_id, d.score, None))
    if not any(prompts.values()):
        raise DataError(f"none of the {len(detections)} detections in {path} is for an image to evaluate.")
    return prompts


def _valid_prompts(prompts: list[_Prompt], image: CocoImage) -> list[_Prompt]:
    if not prompts:
        return []
    boxes, valid = clip_boxes(np.stack([p.box for p in prompts]), image.size)
    if not valid.all():
        logger.warning("%s: %d boxes without area inside the image dropped", image.file_name, (~valid).sum())
    return [_Prompt(box, p.category_id, p.score, p.target) for box, p, ok in zip(boxes, prompts, valid) if ok]


def _predict(
    model: SamModel,
    preprocess: Preprocessor,
    instances: CocoInstances,
    image: CocoImage,
    folder: str | Path,
    prompts: list[_Prompt],
    prompts_per_batch: int,
) -> list[tuple[Rle, float]]:
    """Mask and predicted IoU of each prompt."""
    if not prompts:
        return []
    pixel_values, geometry = preprocess(instances.read_image(image, folder))
    embeddings = encode_image(model, pixel_values)
    boxes = torch.from_numpy(geometry.boxes_to_input(np.stack([p.box for p in prompts]))).float()
    masks = []
    for batch in boxes.split(prompts_per_batch):
        low_res, iou = predict_logits(model, embeddings, boxes=batch)
        masks += [(_to_rle(m, geometry, preprocess), float(i)) for m, i in zip(low_res[:, 0], iou[:, 0])]
    return masks


def _to_rle(low_res: Tensor, geometry: Geometry, preprocess: Preprocessor) -> Rle:
    # One mask at a time: a batch of logits at the size of a photograph would not fit in memory.
    return mask_to_rle(geometry.masks_to_original(low_res, preprocess.image_size) > 0)
