"""What the report is made of: a packed folder and the diagnosis in it, read without torch and without its weights."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carsam.errors import CheckpointError, DataError
from carsam.models.names import Names, names_of_type
from carsam.pack.folder import CONFIG, METHOD, RECIPE, RESULTS, WEIGHTS, is_stand_in
from carsam.reading import MAX_YAML_BYTES, cleaned, parse_yaml, read_json, read_text
from carsam.report.limits import check_amounts, shortened
from carsam.report.order import Site, layout_sites, mapping

DIAGNOSIS = "diagnosis"
DIAGNOSIS_FORMAT = 1
_MAX_CONFIG = 20 * 2**20
_MAX_SITES = 20_000
# 100,000 images take 40 MB of results.
_MAX_RESULTS = 256 * 2**20
_MAX_DIAGNOSIS = 64 * 2**20
_MAX_HEADER = 100 * 2**20
_MAX_DIMENSIONS = 16


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
        names: How its family calls its modules.
        recipe_text: ``recipe.yaml``; None where there is none.
        recipe: The same as a mapping.
        quantization, evaluation: Parts of ``results.json``; empty where they were not measured.
        float_evaluation: Scores of the float model on the same data; empty where not known.
        diagnosis: ``diagnosis/diagnosis.json``; None where there is none.
        tensors: The table of contents of the weights file, by name.
        weights_bytes: Size of the weights file; None where there is none.
    """

    folder: Path
    config: dict[str, Any]
    sites: list[Site]
    names: Names = field(default_factory=Names)
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
        return cleaned(self.folder.name or self.folder.resolve().name or str(self.folder))

    @property
    def quantization_config(self) -> dict[str, Any]:
        """Method, bits and version."""
        return mapping(self.config.get("quantization_config"))

    @property
    def is_stand_in(self) -> bool:
        """Whether it was made from the embedded stand-in."""
        return is_stand_in(self.config, str(self.recipe.get("model") or ""))

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
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder} is not a folder; give the folder that carsam quantize wrote.")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}; give the folder that carsam quantize wrote.")
    fix = "get the folder again"
    config = shortened(read_json(folder / CONFIG, fix, most=_MAX_CONFIG, error=CheckpointError))
    packing = mapping(config.get("quantization_config"))
    if packing.get("quant_method") != METHOD:
        raise CheckpointError(f"{folder} is not a packed carsam model; give the folder that carsam quantize wrote.")
    names = names_of_type(config.get("model_type"))
    sites = layout_sites(mapping(packing.get("layout")), names)
    if not sites:
        raise CheckpointError(f"{folder / CONFIG} names no quantized layer; {fix}.")
    if len(sites) > _MAX_SITES:
        raise CheckpointError(f"{folder / CONFIG} names {len(sites)} quantized sites, more than any model has; {fix}.")

    results = _optional_json(folder / RESULTS, "remove it and run carsam evaluate again", _MAX_RESULTS) or {}
    floating = mapping(results.get("float_evaluation"))
    if float_scores is not None:
        floating = _read_float_scores(Path(float_scores))
    recipe_text = None
    if (folder / RECIPE).is_file():
        recipe_text = cleaned(read_text(folder / RECIPE, MAX_YAML_BYTES, fix))
    has_weights = (folder / WEIGHTS).is_file()
    return Source(
        folder=folder,
        config=config,
        sites=sites,
        names=names,
        recipe_text=recipe_text,
        recipe=shortened(mapping(parse_yaml(recipe_text or "", str(folder / RECIPE), fix))),
        quantization=mapping(results.get("quantization")),
        evaluation=mapping(results.get("evaluation")),
        float_evaluation=floating,
        diagnosis=_read_diagnosis(folder / DIAGNOSIS / "diagnosis.json"),
        tensors=_read_header(folder / WEIGHTS) if has_weights else {},
        weights_bytes=(folder / WEIGHTS).stat().st_size if has_weights else None,
    )


def _optional_json(path: Path, fix: str, most: int) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    values = shortened(read_json(path, fix, most=most))
    check_amounts(values, path, fix)
    return values


def _read_float_scores(path: Path) -> dict[str, Any]:
    """Scores as ``carsam evaluate FLOAT --json FILE`` writes them, or a ``results.json`` that holds them."""
    fix = "write it with carsam evaluate FLOAT --json FILE"
    values = shortened(read_json(path, fix, most=_MAX_RESULTS))
    check_amounts(values, path, fix)
    inner = mapping(values.get("float_evaluation"))
    return values if "mean_iou" in values or not inner else inner


def _read_diagnosis(path: Path) -> dict[str, Any] | None:
    fix = "remove the folder and run carsam diagnose again"
    diagnosis = _optional_json(path, fix, _MAX_DIAGNOSIS)
    if diagnosis is not None and diagnosis.get("format") != DIAGNOSIS_FORMAT:
        raise DataError(
            f"{path} has the format {diagnosis.get('format')!r}, but this carsam reads {DIAGNOSIS_FORMAT}; {fix}."
        )
    return diagnosis


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The table of contents of a safetensors file: its length as eight bytes, then JSON.

    Raises:
        CheckpointError: The file is truncated or altered.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _MAX_HEADER):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        return {
            name: _stored_tensor(entry, size - 8 - length) for name, entry in header.items() if name != "__metadata__"
        }
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or altered; get the folder again.") from error


def _stored_tensor(entry: dict[str, Any], most: int) -> StoredTensor:
    """An entry of the table of contents.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: It cannot be true of a file with ``most`` bytes of tensors.
    """
    (start, end), shape = entry["data_offsets"], entry["shape"]
    if not all(type(number) is int for number in (start, end, *shape)) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError("a shape or a place is no list of whole numbers")
    # Nothing is stored in less than four bits; a tensor of no element may have any shape.
    if not 0 <= start <= end <= most or math.prod(shape) > 2 * (end - start) or min(shape, default=0) < 0:
        raise ValueError("a tensor lies beyond the end of the file")
    return StoredTensor(tuple(shape), end - start)
