"""Teaches transformers to load packed folders, at the moment when it can be taught.

The registration itself (:mod:`carsam.pack.transformers`) needs torch and transformers, which take seconds to import.
Whoever loads a packed folder with transformers imports its SAM first, so the registration waits for that import.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

SAM = "transformers.models.sam.modeling_sam"


def register_on_import() -> None:
    """Registers packed folders with transformers: now where its SAM is imported already, else when it is."""
    if SAM in sys.modules:
        importlib.import_module("carsam.pack.transformers")
    elif not any(isinstance(finder, _SamFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _SamFinder())


class _SamFinder:
    """Finds transformers' SAM as Python would, with a loader that registers afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != SAM:
            return None
        # Once only: what follows, and every later import, goes the usual way.
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader:
    """Loads a module as its own loader does, then registers packed folders."""

    def __init__(self, own: Loader):
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Tools that read a module's source (inspect, torch.compile) ask its loader: they must find the usual one.
        module.__loader__ = self._own
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        self._own.exec_module(module)
        importlib.import_module("carsam.pack.transformers")
