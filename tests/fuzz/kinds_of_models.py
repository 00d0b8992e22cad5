"""Float models and packed folders that are fuzzed: see :mod:`kinds`."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_base import Base, Run, command, mutate_json_file, mutate_safetensors, outputs
from mutations import mutate_bytes, mutate_json

import carsam
from carsam.errors import CarsamError
from carsam.models.load import load_model
from carsam.models.skeleton import BAD_CONFIG


def checkpoints(rng: random.Random, folder: Path, base: Base) -> Run:
    """A float model: .pth, .safetensors, or a transformers folder."""
    choice = rng.randrange(10)
    if choice < 5:
        shutil.copytree(base.model_folder, folder / "model")
        target = folder / "model"
        if choice < 3:
            mutate_json_file(rng, target / "config.json")
        elif choice == 3:
            mutate_safetensors(rng, target / "model.safetensors")
        else:
            text = json.dumps(mutate_json(rng, _PREPROCESSOR))
            (target / "preprocessor_config.json").write_text(text)
    elif choice == 5:
        target = folder / "model.safetensors"
        shutil.copy(base.model_folder / "model.safetensors", target)
        mutate_safetensors(rng, target)
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
        mutate_json_file(rng, path)
    elif path.suffix == ".safetensors":
        mutate_safetensors(rng, path)
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
