"""What the fuzzed kinds have in common: what is mutated, and how a command is run."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mutations import json_bytes, json_text, mutate_bytes, mutate_json
from safetensors.torch import load_file
from typer.testing import CliRunner

import carsam
from carsam.cli import app
from carsam.data.images.reading import read_image
from carsam.errors import CarsamError
from carsam.models.load import load_model
from carsam.predict.predictor import SamPredictor

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


def mutate_json_file(rng: random.Random, path: Path) -> None:
    """Damages the values in a JSON file."""
    path.write_bytes(json_bytes(rng, mutate_json(rng, json.loads(path.read_text()))))


def mutate_safetensors(rng: random.Random, path: Path) -> None:
    """Damages the bytes or the table of contents of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.4:
        path.write_bytes(mutate_bytes(rng, data, near=rng.choice((8, 8 + length, None))))
        return
    header = json_text(mutate_json(rng, json.loads(data[8 : 8 + length]))).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
