"""The kinds of input that are fuzzed: what is written, and the reader that a command uses for it.

Every kind is a function of a random generator, an empty folder and the :class:`Base`; it writes its files there and
returns what is to be run. That must end in success or in a ``CarsamError``; a wrong success raises ``AssertionError``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from mutations import json_bytes, json_text, mutate_bytes, mutate_json, png
from packed_example import write_all
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import carsam
from carsam.cli import app
from carsam.commands.recipe import quantize_config, read_yaml
from carsam.config import QuantizeConfig
from carsam.data.calibration import calibration_set
from carsam.data.images import list_images, read_image
from carsam.errors import CarsamError
from carsam.evaluate.coco_metrics import evaluate_coco
from carsam.evaluate.comparison import Comparison
from carsam.models.load import load_model
from carsam.models.random_init import BAD_CONFIG
from carsam.predict.inputs import find_photos, measure
from carsam.predict.prompts import read_prompts
from carsam.predictor import SamPredictor
from carsam.report.page import write_report

Run = Callable[[], object]
N_IMAGES = 2


@dataclass(frozen=True)
class Base:
    """What is mutated.

    Attributes:
        root: The checkout.
        packed: A packed folder of the embedded model.
    """

    root: Path
    packed: Path
    memory: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def model_folder(self) -> Path:
        return self.root / "embedded" / "sam-nano-256"

    @cached_property
    def model(self) -> Any:
        return load_model(self.model_folder)

    @cached_property
    def images(self) -> Path:
        return self.root / "embedded" / "images" / "evaluation" / "images"

    @cached_property
    def coco(self) -> dict[str, Any]:
        """Two small images with their objects, polygons and RLE."""
        values = json.loads((self.images.parent / "instances.json").read_text())
        images = sorted(values["images"], key=lambda image: image["id"])[:N_IMAGES]
        ids = {image["id"] for image in images}
        chosen = [a for a in values["annotations"] if a["image_id"] in ids]
        return {**values, "images": images, "annotations": chosen[:8] + chosen[-4:]}

    @cached_property
    def state(self) -> dict[str, torch.Tensor]:
        return load_file(self.model_folder / "model.safetensors")

    @cached_property
    def probe(self) -> np.ndarray:
        return read_image(sorted(self.images.iterdir())[0])

    @cached_property
    def packed_output(self) -> tuple[np.ndarray, ...]:
        return outputs(carsam.load(self.packed), self.probe)


def outputs(model: Any, image: np.ndarray) -> tuple[np.ndarray, ...]:
    """Masks, scores and logits of a model for one box."""
    predictor = SamPredictor(model)
    predictor.set_image(image)
    return predictor.predict(box=np.array([20.0, 30.0, 200.0, 220.0]), multimask_output=True)


def command(*arguments: object) -> Run:
    """A command in this process: it must end with 0, 1 or 2, and a failure with one message."""

    def run() -> None:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code in (0, 1, 2), f"exit code {result.exit_code}"
        assert "Traceback" not in result.output, result.output[-500:]
        if result.exit_code:
            assert "rror" in result.stderr, f"no message: {result.output[-200:]!r}"
            raise CarsamError(result.stderr)

    return run


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


def checkpoints(rng: random.Random, folder: Path, base: Base) -> Run:
    """A float model: .pth, .safetensors, or a transformers folder."""
    choice = rng.randrange(10)
    if choice < 5:
        shutil.copytree(base.model_folder, folder / "model")
        target = folder / "model"
        if choice < 3:
            _mutate_json_file(rng, target / "config.json")
        elif choice == 3:
            _mutate_safetensors(rng, target / "model.safetensors")
        else:
            text = json.dumps(mutate_json(rng, _PREPROCESSOR))
            (target / "preprocessor_config.json").write_text(text)
    elif choice == 5:
        target = folder / "model.safetensors"
        shutil.copy(base.model_folder / "model.safetensors", target)
        _mutate_safetensors(rng, target)
    else:
        target = folder / "model.pth"
        _write_pth(rng, target, base)
    if rng.randrange(8) == 0:
        return command("info", target)
    return lambda: load_model(target)


_PREPROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "size": {"longest_edge": 256},
    "pad_size": {"height": 256, "width": 256},
    "image_processor_type": "SamImageProcessor",
}


def _mutate_json_file(rng: random.Random, path: Path) -> None:
    path.write_bytes(json_bytes(rng, mutate_json(rng, json.loads(path.read_text()))))


def _mutate_safetensors(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.4:
        path.write_bytes(mutate_bytes(rng, data, near=rng.choice((8, 8 + length, None))))
        return
    header = json_text(mutate_json(rng, json.loads(data[8 : 8 + length]))).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


class _Odd:
    """What a checkpoint of another program might hold: loading it would run its code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("a checkpoint ran code",))


def _write_pth(rng: random.Random, path: Path, base: Base) -> None:
    tensors: dict[str, Any] = dict(base.state)
    prefix = rng.choice(("", "module.", "model.", "sam."))
    name = rng.choice(list(tensors))
    odd = (
        *(None, 1.5, "text", np.float64(3), [1, 2], {"a": 1}, torch.zeros(0), torch.zeros(3, dtype=torch.complex64)),
        *(torch.full((2, 2), float("nan")), torch.zeros(1).expand(10**6, 10**6), tensors[name].flatten(), _Odd()),
        *(torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8), torch.zeros(2).to_sparse()),
    )
    action = rng.randrange(6)
    if action == 0:
        del tensors[name]
    elif action == 1:
        tensors[name] = rng.choice(odd)
    elif action == 2:
        digits = [part for part in name.split(".") if part.isdigit()] or ["x"]
        tensors[name.replace(digits[0], rng.choice(("3000000", "-1", "01", "")), 1)] = tensors.pop(name)
    elif action == 3:
        tensors[rng.choice((3, None, "", ("a",), "x" * 5000, "optimizer"))] = rng.choice(odd)
    state: Any = {prefix + key if isinstance(key, str) else key: value for key, value in tensors.items()}
    wrapped = {"model": state, "epoch": 3, "args": rng.choice(odd)}
    state = rng.choice((state, state, wrapped, {"state_dict": state}, [state]))
    if action == 5:
        small = {key: torch.zeros(1) for key in list(tensors)[:5]}
        path.write_bytes(mutate_bytes(rng, rng.choice((pickle.dumps(_Odd()), pickle.dumps(list(small))))))
        return
    torch.save(state, path)
    if action == 4:
        path.write_bytes(mutate_bytes(rng, path.read_bytes(), near=rng.choice((None, 2000))))


def packed(rng: random.Random, folder: Path, base: Base) -> Run:
    """A packed folder: it fails, or computes what it computed before it was damaged."""
    target = folder / "packed"
    shutil.copytree(base.packed, target)
    names = [
        "config.json",
        "model.safetensors",
        "recipe.yaml",
        "preprocessor_config.json",
        "SHA256SUMS",
        "results.json",
    ]
    path = target / rng.choice([name for name in names if (target / name).is_file()])
    if rng.randrange(12) == 0:
        path.unlink()
    elif path.suffix == ".json":
        _mutate_json_file(rng, path)
    elif path.suffix == ".safetensors":
        _mutate_safetensors(rng, path)
    else:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    resealed = rng.random() < 0.4 and path.name != "SHA256SUMS"
    if resealed:
        _seal(target)
    choice = rng.randrange(8)
    if choice == 0:
        return command("info", target)
    if choice == 1:
        return command("report", target)
    expected = base.packed_output

    def read() -> None:
        model = carsam.load(target) if choice % 2 else _from_pretrained(target)
        found = outputs(model, base.probe)
        # Whoever writes the checksums anew can change the weights; then only the form is checked.
        if not resealed:
            assert all(np.array_equal(a, b) for a, b in zip(found, expected)), "other outputs than before the damage"

    return read


def _from_pretrained(folder: Path) -> Any:
    """Through transformers, which reads the configuration itself: its own errors are as good as carsam's here."""
    from transformers import SamModel

    try:
        return SamModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    except BAD_CONFIG as error:
        if isinstance(error, CarsamError):
            raise
        raise CarsamError(f"transformers: {error!r}") from error
    except OSError as error:
        raise CarsamError(f"transformers: {error!r}") from error


def _seal(folder: Path) -> None:
    """Writes the checksums anew, as somebody would who wants the damage to pass."""
    sums = folder / "SHA256SUMS"
    names = [line.partition("  ")[2] for line in sums.read_text().splitlines()]
    present = [name for name in names if (folder / name).is_file()]
    sums.write_text("".join(f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in present))


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
        _mutate_json_file(rng, path)
    elif path.suffix == ".safetensors":
        _mutate_safetensors(rng, path)
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


def _self_test(name: str) -> Run:
    """What the harness must notice."""

    def raises() -> None:
        raise KeyError("x")

    def hangs() -> None:
        time.sleep(60)

    def grows() -> None:
        bytearray(2_000_000_000)

    def prints() -> None:
        print("hello")

    def ends() -> None:
        os._exit(3)

    def refuses() -> None:
        raise CarsamError("told in words")

    return {f.__name__: f for f in (raises, hangs, grows, prints, ends, refuses)}[name]


def prepare(kind: str, rng: random.Random, folder: Path, base: Base) -> Run:
    """Writes an input of a kind; what is then to be run."""
    if kind.startswith("self-test: "):
        return _self_test(kind.partition(": ")[2])
    return KINDS[kind][0](rng, folder, base)


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
