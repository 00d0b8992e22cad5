"""The kinds of input that are fuzzed: what is written, and the reader that a command uses for it.

Every kind is a function of a random generator, an empty folder and the :class:`Base`; it writes its files there and
returns what is to be run. That must end in success or in a ``CarsamError``; a wrong success raises ``AssertionError``.
"""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fuzz_base import Base, Run, command, mutate_json_file, mutate_safetensors
from kinds_of_models import checkpoints, packed
from mutations import json_bytes, json_text, mutate_bytes, mutate_json, png
from packed_example import write_all
from PIL import Image

from carsam.commands.recipe import quantize_config, read_yaml
from carsam.config import QuantizeConfig
from carsam.data.images.reading import list_images, read_image
from carsam.evaluate.coco_metrics import evaluate_coco
from carsam.predict.inputs import find_photos, measure
from carsam.predict.prompts import read_prompts
from carsam.prompts.calibration import calibration_set
from carsam.report.page import write_report
from carsam.run.comparison import Comparison


def _in_range(scores: dict[str, Any]) -> None:
    for key, value in scores.items():
        if key.startswith(("segm_ap", "box_ap", "mean_iou")) and isinstance(value, float):
            assert 0 <= value <= 100, f"{key} is {value}"


def coco(rng: random.Random, folder: Path, base: Base) -> Run:
    """An annotation file, for evaluation, calibration or as prompts."""
    path = folder / "instances.json"
    path.write_bytes(json_bytes(rng, mutate_json(rng, base.coco)))
    choice = rng.randrange(10)
    if choice == 0:
        return lambda: calibration_set(base.model, base.images, coco=path, n_images=1, boxes_per_image=2)
    if choice == 1:
        return command("evaluate", base.model_folder, "--coco", path, "--images", base.images, "--limit", "1")
    if choice == 2:
        return _assign(path, base)
    return lambda: _in_range(evaluate_coco(base.model, path, base.images).to_dict())


def detections(rng: random.Random, folder: Path, base: Base) -> Run:
    """A file of detection results."""
    truth, path = folder / "instances.json", folder / "detections.json"
    truth.write_text(json.dumps(base.coco))
    values = [
        {**{key: a[key] for key in ("image_id", "category_id", "bbox")}, "score": rng.random()}
        for a in base.coco["annotations"]
    ]
    path.write_bytes(json_bytes(rng, mutate_json(rng, values)))
    return lambda: _in_range(evaluate_coco(base.model, truth, base.images, detections=path).to_dict())


_MODES = {
    "png": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "I"),
    "tiff": ("RGB", "RGBA", "L", "1", "I;16", "F", "CMYK", "LAB", "YCbCr"),
    "jpeg": ("RGB", "L", "CMYK"),
    "webp": ("RGB", "RGBA"),
    "bmp": ("RGB", "L", "1", "P"),
    "gif": ("L", "P"),
    "ppm": ("RGB", "L", "1", "I;16"),
    "jpeg2000": ("RGB", "L", "RGBA"),
    "avif": ("RGB",),
    "ico": ("RGBA",),
    "tga": ("RGB", "L"),
}


def images(rng: random.Random, folder: Path, base: Base) -> Run:
    """An image file of any format, with its bytes damaged or another size in its header."""
    kind = rng.choice(list(_MODES))
    path = folder / f"photo.{rng.choice((kind, kind, kind, 'png', 'jpg'))}"
    path.write_bytes(_picture(rng, kind, base))
    choice = rng.randrange(6)
    if choice == 0:
        (folder / "good.jpg").write_bytes(sorted(base.images.iterdir())[1].read_bytes())
        return lambda: [calibration_set(base.model, folder, n_images=2, box_source="grid"), list_images(folder)]
    if choice == 1:
        out = folder / "out"
        return command("predict", base.model_folder, path, "--box", "1,1,20,20", "--out", out, "--device", "cpu")

    def read() -> None:
        pixels = read_image(path)
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, (pixels.dtype, pixels.shape)

    return read


def _picture(rng: random.Random, kind: str, base: Base) -> bytes:
    small = Image.fromarray(base.probe).resize((rng.choice((1, 8, 64)), rng.choice((1, 8, 48))))
    mode = rng.choice(_MODES[kind])
    if mode in ("I;16", "I", "F"):
        values = np.asarray(small.convert("L")).astype(np.uint16) * rng.choice((1, 16, 257))
        small = Image.fromarray(values if mode == "I;16" else values.astype(np.int32 if mode == "I" else np.float32))
    else:
        small = small.convert(mode) if mode != "LAB" else Image.merge("LAB", small.convert("RGB").split())
    options: dict[str, Any] = {}
    if kind in ("jpeg", "webp", "tiff", "png") and rng.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = rng.choice((0, 1, 2, 3, 5, 6, 8, 9, 65535))
        options["exif"] = exif
    buffer = io.BytesIO()
    try:
        small.save(buffer, kind.upper(), **options)
    except (OSError, ValueError, KeyError, SystemError):
        small.convert("L").save(buffer, "PNG")
    data = buffer.getvalue()
    choice = rng.randrange(8)
    if choice == 0:
        side = (0, 1, 60_000, 2**31 - 1, 20_000)
        return png(rng.choice(side), rng.choice(side), rng.choice((1, 8, 16)), rng.choice((0, 2, 3, 4, 6)), data[:99])
    if choice == 1:
        return data
    return mutate_bytes(rng, data, near=rng.choice((None, 64, 64)))


def recipes(rng: random.Random, folder: Path, base: Base) -> Run:
    """A recipe for ``quantize`` or ``compare``."""
    path = folder / "recipe.yaml"
    sweep = rng.random() < 0.3
    values = _SWEEP if sweep else yaml.safe_load((base.packed / "recipe.yaml").read_text())
    mutated = mutate_json(rng, values)
    if rng.random() < 0.5:
        text = (
            yaml.safe_dump(json.loads(json_text(mutated), parse_int=_parse_int))
            if _shallow(mutated)
            else json_text(mutated)
        )
    else:
        text = json_text(mutated)
    data = text.encode("utf-8", "surrogatepass")
    path.write_bytes(mutate_bytes(rng, data) if rng.random() < 0.4 else data)
    if sweep:
        return lambda: Comparison.from_dict(read_yaml(path))

    def read() -> None:
        config = quantize_config(recipe=path)
        assert QuantizeConfig.from_dict(config.to_dict()) == config

    return read


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) < 300 else float("inf")


def _shallow(value: Any) -> bool:
    return len(json_text(value)) < 20_000 and "[[[[[[[[[[[[" not in json_text(value)


_SWEEP = {
    "model": "embedded/sam-nano-256",
    "coco": "instances.json",
    "images": "images",
    "bits": ["w4a4", "w6a6"],
    "seeds": [0, 1],
    "calibration": {"images": "images", "n_images": 4},
    "rows": [{"name": "a", "method": "rtn"}, {"name": "b", "method": "car-sam", "settings": {"granularity": "pair"}}],
    "published": [{"name": "c", "bits": "w4a4", "model": "SAM-B", "segm_ap": 40.0, "source": "x"}],
}


def prompts(rng: random.Random, folder: Path, base: Base) -> Run:
    """A file of prompts in JSON lines."""
    names = [image["file_name"] for image in base.coco["images"]]
    lines: list[dict[str, Any]] = [
        {"image": names[0], "boxes": [[10, 20, 200, 220.5]], "points": [[50, 60]], "labels": [1]},
        {"image": names[1], "points": [[[5, 6], [7, 8]], [[9, 10]]], "labels": [[1, 0], [1]]},
    ]
    path = folder / "prompts.jsonl"
    mutated = mutate_json(rng, lines)
    entries = mutated if isinstance(mutated, list) else [mutated]
    text = "\n".join(map(json_text, entries)) if rng.random() < 0.7 else json_text(mutated)
    data = text.encode("utf-8", "surrogatepass")
    path.write_bytes(mutate_bytes(rng, data) if rng.random() < 0.2 else data)
    if rng.randrange(6) == 0:
        photo = base.images / names[0]
        return command(
            "predict", base.model_folder, photo, "--prompts", path, "--out", folder / "out", "--device", "cpu"
        )
    return _assign(path, base)


def _assign(path: Path, base: Base) -> Run:
    def read() -> None:
        photos, _ = measure(find_photos([str(base.images)]))
        read_prompts(path).assign(photos)

    return read


def report(rng: random.Random, folder: Path, base: Base) -> Run:
    """A folder to report on: results, diagnosis, recipe, configuration, pictures, scores of the float model."""
    if "report" not in base.memory:
        base.memory["report"] = write_all(folder.parent / "report-base", picture_side=32)
    target = folder / "packed"
    shutil.copytree(base.memory["report"], target)
    floating = folder / "float.json"
    floating.write_text(json.dumps(json.loads((target / "results.json").read_text())["float_evaluation"]))
    names = ["results.json", "diagnosis/diagnosis.json", "config.json", "recipe.yaml", "model.safetensors"]
    pictures = [str(path.relative_to(target)) for path in sorted((target / "diagnosis").rglob("*.png"))]
    path = rng.choice([*(target / name for name in (*names, *names[:2], rng.choice(pictures))), floating])
    if path.suffix == ".json":
        mutate_json_file(rng, path)
    elif path.suffix == ".safetensors":
        mutate_safetensors(rng, path)
    else:
        path.write_bytes(mutate_bytes(rng, path.read_bytes(), near=rng.choice((None, 40))))
    scores = floating if path == floating else None
    if rng.randrange(8) == 0:
        return command("report", target, *(["--float-scores", scores] if scores else []))

    def read() -> None:
        made = write_report(target, folder / "report.html", scores)
        assert made.html.rstrip().endswith("</html>")
        assert len(made.html) < 20_000_000

    return read


# Shares of the inputs in a run, in percent.
KINDS: dict[str, tuple[Callable[[random.Random, Path, Base], Run], int]] = {
    "coco": (coco, 28),
    "detections": (detections, 10),
    "images": (images, 20),
    "checkpoints": (checkpoints, 10),
    "packed": (packed, 8),
    "recipes": (recipes, 10),
    "prompts": (prompts, 8),
    "report": (report, 6),
}
