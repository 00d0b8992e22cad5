"""What is measured: a float model in several hands, and ours; each writes files and says how a worker opens them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from carsam.benchmark.process import SubjectError
from carsam.models.family import family_of
from carsam.runtime.onnx import DECODER, ENCODER, files_key, write_halves

# What others install, by the name that is imported.
INSTALL = {
    "onnxruntime": 'pip install "carsam[onnx]"',
    "openvino": 'pip install "carsam[openvino]"',
    "nncf": "pip install nncf==2.17 (for OpenVINO 2025.2)",
    "torchao": "pip install torchao",
}
BASELINE = "ONNX Runtime FP32"


@dataclass(frozen=True)
class Work:
    """What subjects are made from.

    Attributes:
        source: Of the float model.
        model: The float model.
        packed: Packed folders by name for people (``W4A4``), with their models.
        folder: Where files are written.
        images: Preprocessed images (1, 3, S, S), for calibration by others.
        threads: Of every subject.
        image_size: As the user gave it.
    """

    source: str
    model: PreTrainedModel
    packed: dict[str, PreTrainedModel]
    folder: Path
    images: Sequence[np.ndarray]
    threads: int
    image_size: int | None = None

    def spec(self, kind: str, **fields: Any) -> dict[str, Any]:
        """What a worker opens."""
        return {"kind": kind, "threads": self.threads, **fields}

    def float_files(self) -> Path:
        """The float model's halves as ONNX files."""
        return self._files("float", self.model)

    def own_files(self, name: str, *, loops: bool = True) -> Path:
        """A packed model's halves as ONNX files."""
        return self._files(name.lower(), self.packed[name], loops=loops)

    def _files(self, name: str, model: PreTrainedModel, *, loops: bool = True) -> Path:
        # A folder that is kept may hold the files of another model by the same name.
        key = files_key(model)[:8] + ("" if loops else "-no-loops")
        return write_halves(model, family_of(model), self.folder / f"{name}-{key}", loops=loops)


@dataclass(frozen=True)
class Subject:
    """One row.

    Attributes:
        name: For people.
        needs: Packages, by the names that are imported.
        prepare: Writes its files; gives what a worker opens, and their bytes.
        ours: Whether it runs integers of carsam's.
    """

    name: str
    needs: tuple[str, ...]
    prepare: Callable[[Work], tuple[dict[str, Any], int]]
    ours: bool = False

    def missing(self) -> str:
        """Why it cannot be measured here; empty where nothing is known against it."""
        gone = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"not installed: {INSTALL.get(gone[0], f'pip install {gone[0]}')}" if gone else ""

    def versions(self) -> str:
        """Versions of what it needs."""
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in self.needs)


def _size(*paths: str | Path) -> int:
    """Bytes of files, and of the weights that lie beside them."""
    found = 0
    for path in map(Path, paths):
        found += path.stat().st_size
        for beside in (path.with_suffix(".bin"), path.with_name(path.name + ".data")):
            found += beside.stat().st_size if beside != path and beside.exists() else 0
    return found


def _onnx(folder: Path, work: Work) -> tuple[dict[str, Any], int]:
    files = {"encoder": str(folder / ENCODER), "decoder": str(folder / DECODER)}
    return work.spec("onnxruntime", **files), _size(*files.values())


def _dynamic(work: Work) -> tuple[dict[str, Any], int]:
    """As samexporter's exporters do with ``--quantize-out``; their files have constants folded."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain, out = _folded(work), work.folder / "dynamic"
    out.mkdir(exist_ok=True)
    settings = {"per_channel": False, "reduce_range": False, "weight_type": QuantType.QUInt8}
    logging.disable(logging.WARNING)  # it recommends another preparation of the file on the root logger
    try:
        for name in (ENCODER, DECODER):
            quantize_dynamic(str(plain / name), str(out / name), **settings)
    finally:
        logging.disable(logging.NOTSET)
    return _onnx(out, work)


def _folded(work: Work) -> Path:
    """The float model's files with operations on constants computed: other quantizers look for weights as constants."""
    import onnxruntime

    plain, out = work.float_files(), work.folder / "folded"
    out.mkdir(exist_ok=True)
    for name in (ENCODER, DECODER):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(out / name)
        onnxruntime.InferenceSession(str(plain / name), options, providers=["CPUExecutionProvider"])
    return out


def _torch(work: Work, **fields: Any) -> tuple[dict[str, Any], int]:
    spec = work.spec("torch", source=work.source, image_size=work.image_size, **fields)
    elements = sum(parameter.numel() for parameter in work.model.parameters())
    if not fields.get("int8"):
        return spec, elements * (2 if fields["dtype"] == "bfloat16" else 4)
    return spec, _torchao_bytes(work)


def _torchao_bytes(work: Work) -> int:
    """Bytes of the quantized model's state as torch.save writes it."""
    import copy

    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(work.model)
    quantize_(family_of(model).embedding_module(model), Int8DynamicActivationInt8WeightConfig())
    with tempfile.TemporaryFile(dir=work.folder) as file:
        torch.save(model.state_dict(), file)
        return file.tell()


def _openvino(work: Work, precision: str) -> tuple[dict[str, Any], int]:
    folder = work.float_files()
    files = {"encoder": str(folder / ENCODER), "decoder": str(folder / DECODER)}
    return work.spec("openvino", precision=precision, **files), _size(*files.values())


def _nncf(work: Work) -> tuple[dict[str, Any], int]:
    """NNCF's post-training quantization of the image encoder for transformers; the decoder stays as it is."""
    import nncf
    import openvino

    plain, out = work.float_files(), work.folder / "nncf"
    out.mkdir(exist_ok=True)
    data = nncf.Dataset([{"pixel_values": image} for image in work.images])
    # convert_model folds constants, which read_model leaves: without it NNCF finds no weights.
    quantized = nncf.quantize(
        openvino.convert_model(str(plain / ENCODER)),
        data,
        subset_size=len(work.images),
        model_type=nncf.ModelType.TRANSFORMER,
    )
    encoder = out / "encoder.xml"
    openvino.save_model(quantized, str(encoder), compress_to_fp16=False)
    files = {"encoder": str(encoder), "decoder": str(plain / DECODER)}
    return work.spec("openvino", precision="f32", **files), _size(*files.values())


def _own_openvino(work: Work, name: str) -> tuple[dict[str, Any], int]:
    import onnx

    from carsam.export.qdq import as_qdq

    plain = work.own_files(name, loops=False)
    out = plain.with_name(f"{plain.name}-qdq")
    out.mkdir(exist_ok=True)
    for half in (ENCODER, DECODER):
        (out / half).write_bytes(as_qdq(onnx.load(str(plain / half))).SerializeToString())
    files = {"encoder": str(out / ENCODER), "decoder": str(out / DECODER)}
    return work.spec("openvino", precision="f32", **files), _size(*files.values())


def subjects(packed: Sequence[str]) -> list[Subject]:
    """All rows in the order of the table; the first is what the others are set against.

    Args:
        packed: Names of ours, as ``W8A8``.
    """
    ort = ("onnx", "onnxruntime")
    rows = [
        Subject(BASELINE, ort, lambda work: _onnx(work.float_files(), work)),
        Subject("ONNX Runtime dynamic INT8 (samexporter)", ort, _dynamic),
    ]
    for name in packed:
        rows.append(
            Subject(
                f"ours {name}, ONNX Runtime",
                ort,
                lambda work, name=name: _onnx(work.own_files(name), work),
                ours=True,
            )
        )
    rows += [
        Subject("OpenVINO FP32", ("onnx", "openvino"), lambda work: _openvino(work, "f32")),
        Subject("OpenVINO bf16", ("onnx", "openvino"), lambda work: _openvino(work, "bf16")),
        Subject("OpenVINO NNCF INT8", ("onnx", "openvino", "nncf"), _nncf),
    ]
    for name in packed:
        rows.append(
            Subject(
                f"ours {name}, OpenVINO",
                ("onnx", "openvino"),
                lambda work, name=name: _own_openvino(work, name),
                ours=True,
            )
        )
    rows += [
        Subject("PyTorch FP32", (), lambda work: _torch(work, dtype="float32")),
        Subject("PyTorch bf16 compiled", (), lambda work: _torch(work, dtype="bfloat16", compiled=True)),
        Subject(
            "torchao dynamic INT8, compiled",
            ("torchao",),
            lambda work: _torch(work, dtype="float32", compiled=True, int8=True),
        ),
    ]
    return rows


def prepared(subject: Subject, work: Work) -> tuple[dict[str, Any], int]:
    """A subject's files.

    Raises:
        SubjectError: They cannot be made here; with the reason.
    """
    if why := subject.missing():
        raise SubjectError(why)
    try:
        return subject.prepare(work)
    except Exception as error:  # of other people's tools; the row says it, and the others are measured
        raise SubjectError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
