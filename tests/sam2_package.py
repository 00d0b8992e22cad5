"""Meta's ``sam2`` package, to compare with: its source distribution, imported from where it is unpacked.

Nothing is installed: it would want hydra, iopath, torchvision and a compiler, of which its models use only the few
names that stand in here. The archive (150 kB) is kept in the user's cache folder; PyYAML reads its configurations.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import platformdirs
import pytest
import torch
import torchvision_shim
import yaml
from torch import Tensor, nn

from carsam.output.files import whole_file

VERSION, SHA256 = "1.1.0", "7e0ea252d43c10d853e3acfce0b5770ac683c30481bd6de311300e9d44f45b74"


@cache
def package() -> Path:
    """The folder that holds the unpacked package; the test is skipped where the archive cannot be had."""
    folder = platformdirs.user_cache_path("carsam-tests")
    archive, place = folder / f"sam2-{VERSION}.tar.gz", folder / f"sam2-{VERSION}"
    if not archive.is_file():
        with tempfile.TemporaryDirectory() as temporary:
            # Without a build environment of its own, for which pip would download another torch.
            options = ["--no-deps", "--no-build-isolation", "--no-binary", "sam2", "--no-input", "--quiet"]
            command = [sys.executable, "-m", "pip", "download", *options, "--dest", temporary, f"sam2=={VERSION}"]
            environment = {**os.environ, "SAM2_BUILD_CUDA": "0"}
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
            if done.returncode:
                pytest.skip(f"the source of sam2 {VERSION} cannot be downloaded: {done.stderr.strip()[-200:]}")
            with whole_file(archive) as whole:
                whole.write_bytes((Path(temporary) / archive.name).read_bytes())
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        archive.unlink()
        pytest.fail(f"the archive of sam2 {VERSION} is not the one that this test was written for; it was not run.")
    if not place.is_dir():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
            try:
                (Path(temporary) / place.name).rename(place)
            except OSError:  # another process was faster
                assert place.is_dir()
    return place


def sam2_module(name: str) -> ModuleType:
    """A module of the package; ``sys.path`` and the modules that stand in are as before afterwards."""
    with _importable():
        return importlib.import_module(name)


@contextmanager
def _importable() -> Iterator[None]:
    path = package()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path))
        for stand_ins in (_stand_ins(), torchvision_shim._stand_ins()):
            for name, module in stand_ins.items():
                patch.setitem(sys.modules, name, module)
        transforms = sys.modules["torchvision.transforms"]
        for name in ("Normalize", "Resize", "ToTensor"):  # imported, never called here
            patch.setattr(transforms, name, None, raising=False)
        yield


def _stand_ins() -> dict[str, ModuleType]:
    names = ("hydra", "hydra.core", "hydra.core.global_hydra", "iopath", "iopath.common", "iopath.common.file_io")
    modules = {name: ModuleType(name) for name in names}
    modules["hydra"].initialize_config_module = None
    state = SimpleNamespace(is_initialized=lambda: True)
    modules["hydra.core.global_hydra"].GlobalHydra = SimpleNamespace(instance=lambda: state)
    modules["iopath.common.file_io"].g_pathmgr = None
    return modules


def build(config: str, image_size: int, *, target: str = "", seed: int = 0, **settings: Any) -> nn.Module:
    """A model as the package's ``build_sam2`` makes it, with weights that its constructors draw.

    Args:
        config: Such as ``sam2.1/sam2.1_hiera_t``.
        image_size: Side of the input.
        target: Another class than the configuration's.
        seed: Of the weights.
        **settings: Of the model that are to differ.
    """
    values = yaml.safe_load((package() / "sam2" / "configs" / f"{config}.yaml").read_text())["model"]
    values |= {"image_size": image_size, **settings}
    values["_target_"] = target or values["_target_"]
    # `build_sam2` adds these to every model.
    values["sam_mask_decoder_extra_args"] = {
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        with _importable():
            model = _instantiate(values)
        # What starts at zero would hide an error in it.
        for parameter in model.parameters():
            if not parameter.any() or parameter.abs().max() < 1e-5:
                nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False)


def _instantiate(values: Any) -> Any:
    """As hydra does: mappings with ``_target_`` become objects, from the inside out."""
    if isinstance(values, list):
        return [_instantiate(value) for value in values]
    if not isinstance(values, dict):
        # YAML 1.1 takes 1e-6 for text.
        return float(values) if isinstance(values, str) and values[:1].isdigit() else values
    arguments = {key: _instantiate(value) for key, value in values.items() if key != "_target_"}
    if "_target_" not in values:
        return arguments
    module, _, name = values["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**arguments)


class _Pixels(nn.Module):
    """In the place of the package's transforms: images are preprocessed already."""

    max_hole_area = max_sprinkle_area = mask_threshold = 0.0

    def __init__(self, pixels: Tensor):
        super().__init__()
        self.pixels = pixels

    def forward(self, _image: np.ndarray) -> Tensor:
        return self.pixels[0]

    def postprocess_masks(self, masks: Tensor, size: tuple[int, int]) -> Tensor:
        with _importable():
            return sam2_module("sam2.utils.transforms").SAM2Transforms.postprocess_masks(self, masks, size)


def image_predictor(model: nn.Module, pixels: Tensor, size: tuple[int, int]) -> Any:
    """The package's ``SAM2ImagePredictor`` with an image set.

    Args:
        model: From :func:`build`.
        pixels: (1, 3, S, S) preprocessed image.
        size: (H, W) of the image.
    """
    kind = sam2_module("sam2.sam2_image_predictor").SAM2ImagePredictor
    predictor = kind.__new__(kind)
    grid = model.image_size // 16
    predictor.model, predictor._transforms, predictor.mask_threshold = model, _Pixels(pixels), 0.0
    predictor._bb_feat_sizes = [(scale * grid, scale * grid) for scale in (4, 2, 1)]
    predictor.set_image(np.zeros((*size, 3), dtype=np.uint8))
    return predictor
