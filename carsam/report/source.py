"""What the report is made of: a packed folder and the diagnosis in it, read without torch and without its weights."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from carsam.errors import CarsamError, CheckpointError, DataError
from carsam.report.order import Site, layout_sites, mapping

# The same names as in carsam.pack.checkpoint and carsam.pack.hub, which would import torch: a report takes a moment.
CONFIG, WEIGHTS, RECIPE, RESULTS, QUANT_METHOD = (
    *("config.json", "model.safetensors", "recipe.yaml", "results.json", "carsam"),
)
DIAGNOSIS = "diagnosis"
DIAGNOSIS_FORMAT = 1
_MAX_HEADER = 100 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the weights file: shape and bytes."""

    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Source:
    """A packed folder, read.

    Attributes:
        folder: Where it is.
        config: ``config.json``.
        sites: Every quantized site, in execution order.
        recipe_text: ``recipe.yaml``; None where there is none.
        recipe: The same as a mapping.
        quantization, evaluation: Parts of ``results.json``; empty where they were not measured.
        float_evaluation: Scores of the float model on the same data; empty where not known.
        diagnosis: ``diagnosis/diagnosis.json``; None where there is none.
        tensors: Of the weights file, by name.
        weights_bytes: Size of the weights file; None where there is none.
    """

    folder: Path
    config: dict[str, Any]
    sites: list[Site]
    recipe_text: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    float_evaluation: dict[str, Any] = field(default_factory=dict)
    diagnosis: dict[str, Any] | None = None
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    weights_bytes: int | None = None

    @property
    def name(self) -> str:
        """The folder's name, for commands."""
        return self.folder.name or str(self.folder)

    @property
    def quantization_config(self) -> dict[str, Any]:
        """Method, bits and version."""
        return mapping(self.config.get("quantization_config"))

    @property
    def pictures(self) -> Path:
        """The folder that the diagnosis's pictures lie in."""
        return self.folder / DIAGNOSIS


def read_source(folder: str | Path, float_scores: str | Path | None = None) -> Source:
    """Reads a packed folder.

    Args:
        folder: What ``carsam quantize`` wrote.
        float_scores: What ``carsam evaluate FLOAT --json FILE`` wrote; without it, ``float_evaluation`` of
            ``results.json`` where it is there.

    Raises:
        CarsamError: It is not a packed folder, or a file in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder that carsam quantize wrote.")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}; give the folder that carsam quantize wrote.")
    config = _read_json(folder / CONFIG, "get the folder again")
    packing = mapping(config.get("quantization_config"))
    if packing.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{folder} is not a packed carsam model; give the folder that carsam quantize wrote.")
    sites = layout_sites(mapping(packing.get("layout")))
    if not sites:
        raise CheckpointError(f"{folder / CONFIG} names no quantized layer; get the folder again.")

    results = _optional_json(folder / RESULTS, "remove it and run carsam evaluate again") or {}
    floating = mapping(results.get("float_evaluation"))
    if float_scores is not None:
        floating = _read_json(Path(float_scores), "write it with carsam evaluate FLOAT --json FILE")
    recipe_text = _read_text(folder / RECIPE) if (folder / RECIPE).is_file() else None
    has_weights = (folder / WEIGHTS).is_file()
    return Source(
        folder=folder,
        config=config,
        sites=sites,
        recipe_text=recipe_text,
        recipe=_parse_recipe(folder / RECIPE, recipe_text),
        quantization=mapping(results.get("quantization")),
        evaluation=mapping(results.get("evaluation")),
        float_evaluation=floating,
        diagnosis=_read_diagnosis(folder / DIAGNOSIS / "diagnosis.json"),
        tensors=_read_header(folder / WEIGHTS) if has_weights else {},
        weights_bytes=(folder / WEIGHTS).stat().st_size if has_weights else None,
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is damaged: it is not text.") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error


def _read_json(path: Path, mend: str) -> dict[str, Any]:
    try:
        values = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CarsamError):
            raise
        raise DataError(f"{path} is damaged: it is not valid JSON ({error}); {mend}.") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} is damaged: it holds {type(values).__name__}, not a mapping; {mend}.")
    return values


def _optional_json(path: Path, mend: str) -> dict[str, Any] | None:
    return _read_json(path, mend) if path.is_file() else None


def _read_diagnosis(path: Path) -> dict[str, Any] | None:
    mend = "remove the folder and run carsam diagnose again"
    diagnosis = _optional_json(path, mend)
    if diagnosis is not None and diagnosis.get("format") != DIAGNOSIS_FORMAT:
        raise DataError(
            f"{path} has the format {diagnosis.get('format')!r}, but this carsam reads {DIAGNOSIS_FORMAT}; {mend}."
        )
    return diagnosis


def _parse_recipe(path: Path, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        return mapping(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is damaged: it is not valid YAML; get the folder again.") from error


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The table of contents of a safetensors file: its length as eight bytes, then JSON.

    Raises:
        CheckpointError: The file is truncated or altered.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER:
                raise ValueError("the header is too long")
            header = json.loads(file.read(length))
        tensors = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                tensors[name] = StoredTensor(tuple(int(side) for side in entry["shape"]), int(end) - int(start))
        return tensors
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or altered; get the folder again.") from error
