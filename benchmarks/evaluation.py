"""Speed and memory of evaluation and prediction.

    python benchmarks/evaluation.py                      # a few minutes on two cores
    python benchmarks/evaluation.py --model vit-b --images 0    # SAM-B's architecture, random weights, speed only

Three rows. The first two evaluate and predict the embedded evaluation images with the whole model. The third is a long
evaluation: the embedded images again and again under other names, up to ``--images``, with the image encoder replaced
by a stub that returns the embeddings of the first image (so its speed says nothing about a model; its memory does).
Memory growth is counted from the 100th image to the end, APs and intervals included.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import options
import torch
from torch import Tensor
from transformers import PreTrainedModel

from carsam.data.boxes import clip_boxes
from carsam.data.coco.instances import CocoInstances
from carsam.evaluate.coco_metrics import evaluate_coco
from carsam.evaluate.journal import Journals
from carsam.models.family import family_of
from carsam.models.forward import encode_image, watched
from carsam.models.load import load_model
from carsam.models.sam.random import random_sam
from carsam.predict.predictor import SamPredictor
from carsam.run.memory import peak_memory

EMBEDDED = Path(__file__).resolve().parents[1] / "embedded"
EVALUATION = EMBEDDED / "images" / "evaluation"
# Images after which everything that is allocated once has been.
WARM = 100


class Clock:
    """Seconds spent in both halves of a model, wherever carsam calls them.

    Args:
        embeddings: Given in the place of the encoder's.
    """

    def __init__(self, embeddings: Tensor | None = None) -> None:
        self.seconds = 0.0
        self._embeddings = embeddings

    def __call__(self, name: str, run: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        stubbed = name == "encode" and self._embeddings is not None
        result = self._embeddings if stubbed else run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - started
        return result


@contextmanager
def model_timed(embeddings: Tensor | None = None) -> Iterator[Clock]:
    """Times encoder and decoder inside the block."""
    clock = Clock(embeddings)
    with watched(clock):
        yield clock


def row(name: str, images: int, prompts: int, seconds: float, clock: Clock, growth: str = "-") -> None:
    outside = 100 * (1 - clock.seconds / seconds)
    options.row(name, images, prompts, f"{images / seconds:.2f}", f"{outside:.0f} %", growth)


def evaluation(model: PreTrainedModel) -> None:
    evaluate_coco(model, EVALUATION / "instances.json", EVALUATION / "images", limit=1)
    with model_timed() as clock:
        started = time.perf_counter()
        result = evaluate_coco(model, EVALUATION / "instances.json", EVALUATION / "images")
        seconds = time.perf_counter() - started
    row("evaluate", result.n_images, result.n_prompts, seconds, clock)


def prediction(model: PreTrainedModel) -> None:
    """As the readme shows it: one image, then a call for each box."""
    instances = CocoInstances.from_file(EVALUATION / "instances.json")
    predictor = SamPredictor(model)
    prompts = 0
    with model_timed() as clock:
        started = time.perf_counter()
        for image in instances.images:
            predictor.set_image(instances.read_image(image, EVALUATION / "images"))
            boxes, usable = clip_boxes(instances.boxes(image.id), image.size)
            for box in boxes[usable]:
                predictor.predict(box=box, multimask_output=False)
                prompts += 1
        seconds = time.perf_counter() - started
    row("SamPredictor", len(instances.images), prompts, seconds, clock)


def repeated(folder: Path, count: int) -> Path:
    """A COCO file of ``count`` images: links to the embedded ones, with their objects."""
    content = json.loads((EVALUATION / "instances.json").read_text())
    images, annotations = content["images"], content["annotations"]
    found: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    for i in range(count):
        image = images[i % len(images)]
        name = f"{i:06d}{Path(image['file_name']).suffix}"
        os.symlink(EVALUATION / "images" / image["file_name"], folder / name)
        found["images"].append({**image, "id": i + 1, "file_name": name})
        for annotation in annotations:
            if annotation["image_id"] == image["id"]:
                found["annotations"].append({**annotation, "id": len(found["annotations"]) + 1, "image_id": i + 1})
    (folder / "instances.json").write_text(json.dumps({**content, **found}))
    return folder / "instances.json"


def long_evaluation(model: PreTrainedModel, count: int) -> None:
    side = family_of(model).image_size(model)
    embeddings = encode_image(model, torch.zeros(1, 3, side, side))
    peaks: list[int] = []

    def progress(done: int, total: int) -> None:
        if done == min(WARM, total):
            peaks.append(peak_memory())

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        coco = repeated(Path(folder), count)
        with model_timed(embeddings) as clock:
            started = time.perf_counter()
            with Journals(cache) as journals:
                result = evaluate_coco(model, coco, folder, journals=journals, progress=progress)
                size = sum(path.stat().st_size for path in Path(cache).rglob("*.jsonl"))
            seconds = time.perf_counter() - started
    growth = f"{(peak_memory() - peaks[0]) / 1e6:.0f} MB of {peak_memory() / 1e6:.0f} MB"
    row("evaluate, encoder stubbed", result.n_images, result.n_prompts, seconds, clock, growth)
    print(f"\nKept for resuming until the end: {size / 1e6:.1f} MB on disk.")


@torch.no_grad()
def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--model", default="embedded", help="embedded, vit-b, vit-l or vit-h (random weights)")
    parser.add_argument("--images", type=int, default=5000, help="of the long evaluation; 0 leaves it out")
    arguments = options.parse(parser)
    if arguments.model == "embedded":
        model = load_model(EMBEDDED / "sam-nano-256")
    else:
        model = random_sam(arguments.model).requires_grad_(False)
    options.head("what", "images", "prompts", "images/s", "share of time outside the model", "memory growth")
    evaluation(model)
    prediction(model)
    if arguments.images:
        long_evaluation(model, arguments.images)


if __name__ == "__main__":
    main()
