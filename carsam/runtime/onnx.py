"""A model on ONNX Runtime: its halves as files in the user's cache, written when it is first asked for."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from carsam.data.images.normalisation import normalisation_of
from carsam.errors import CarsamError, CheckpointError
from carsam.models.family import Family, family_of
from carsam.output.user_cache import cache_folder
from carsam.runtime.halves import PROMPTS, Halves
from carsam.version import __version__

if TYPE_CHECKING:
    from carsam.export.trace import Core

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
# Models whose files are kept; the one that was used least recently goes first.
KEPT = 6


class OnnxSession:
    """A file opened with ONNX Runtime on the processor.

    Args:
        path: Of the file.
        threads: Of an operator; torch's number if None.

    Raises:
        CheckpointError: ONNX Runtime cannot read it.
    """

    def __init__(self, path: Path, threads: int | None = None):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no common base but this
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"ONNX Runtime {onnxruntime.__version__} cannot open {path}: {reason}. Update it, or delete the file's "
                "folder, which is written anew."
            ) from error
        self.names = [each.name for each in self.session.get_inputs()]

    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs in the order of the file; inputs that it does not have are left out."""
        return self.session.run(None, {name: inputs[name] for name in self.names})


def onnx_halves(model: PreTrainedModel, *, threads: int | None = None, folder: Path | None = None) -> Halves:
    """A model's halves on ONNX Runtime; quantized layers run in integer kernels.

    Args:
        model: Packed or float, on the CPU.
        threads: Of an operator; torch's number if None.
        folder: Where its files lie or are written; a folder of the user's cache if None.

    Raises:
        ConfigError: ONNX Runtime is missing or too old, or models of this family cannot be exported.
        CarsamError: The files cannot be written.
    """
    from carsam.export.requirements import require_onnx, require_runtime

    require_onnx()
    require_runtime()
    import onnxruntime

    family = family_of(model)
    if folder is None:
        cache = cache_folder() / "onnx"
        folder = write_halves(model, family, cache / files_key(model))
        _forget(cache)
    else:
        write_halves(model, family, folder)
    sessions = [OnnxSession(folder / name, threads) for name in (ENCODER, DECODER)]
    shapes = {each.name: tuple(each.shape) for each in sessions[1].session.get_inputs() if each.name not in PROMPTS}
    side = family.low_res_size(model)
    name = f"onnxruntime {onnxruntime.__version__}"
    return Halves(*sessions, shapes, side, name, family.box_ends_in_no_point)


def write_halves(model: PreTrainedModel, family: Family, folder: Path, *, loops: bool = True) -> Path:
    """Writes a model's halves unless they are there.

    Args:
        model: Packed or float, on the CPU.
        family: Its family.
        folder: Where to.
        loops: Whether large attentions may run in loops, which not every runtime reads.

    Returns:
        ``folder``.

    Raises:
        ConfigError: Models of this family cannot be exported.
        CarsamError: The files cannot be written.
    """
    if all((folder / name).is_file() for name in (ENCODER, DECODER)):
        folder.touch()
        return folder
    from carsam.export.export import FORMAT, write
    from carsam.export.profile import Subject
    from carsam.export.trace import trace

    said = {"carsam.format": FORMAT, "carsam.version": __version__, "carsam.profile": "runtime"}
    subject = Subject(
        name="model",
        title="model",
        family=family.name,
        onnx_files=(),
        normalisation=normalisation_of(model),
        bits=16,
        config={},
        preprocessor={},
        metadata=said,
    )
    write(folder, SimpleNamespace(name="runtime", files=_files), subject, trace(model, family, loops=loops))
    return folder


def _files(subject: Any, core: Core) -> dict[str, Any]:
    """The core graphs with nothing around them: prompts in points with labels, all masks at the decoder's size."""
    from carsam.export.assemble import Around, assemble

    between = dict(zip(core.names, core.shapes))
    encoder = Around({"pixel_values": (1, 3, core.side, core.side)}, between)
    prompts: dict[str, tuple] = {
        "points": ("prompts", "count", 2),
        "labels": ("prompts", "count"),
        "mask": ("masks", 1, core.low_res, core.low_res),
        "has_mask": ("masks",),
    }
    masks = {"logits": ("prompts", "kinds", core.low_res, core.low_res), "iou": ("prompts", "kinds")}
    decoder = Around({**between, **prompts}, masks)
    return {
        ENCODER: assemble(core.encoder, encoder, subject.properties("encoder", core)),
        DECODER: assemble(core.decoder, decoder, subject.properties("decoder", core)),
    }


def files_key(model: PreTrainedModel) -> str:
    """What decides the files: the model's tensors and configuration, and the sources that write them."""
    import onnx

    import carsam.export
    import carsam.models

    digest = hashlib.sha256(f"{__version__} {torch.__version__} {onnx.__version__} {model}".encode())
    digest.update(model.config.to_json_string(use_diff=False).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for package in (carsam.export, carsam.models):
        for path in sorted(Path(package.__file__).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _forget(folder: Path) -> None:
    """Removes the models that were used least recently."""
    for old in _by_use(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def _by_use(folder: Path) -> list[Path]:
    found: Iterable[Path] = (path for path in folder.iterdir() if (path / DECODER).is_file())
    try:
        return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError as error:  # another process removes one
        raise CarsamError(f"{folder} changed while it was read; run the same command again.") from error
