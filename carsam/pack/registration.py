"""Teaches transformers to load packed folders and carsam's own models, at the moment when it can be taught.

What is registered (:mod:`carsam.pack.transformers`, and what families say in their names) needs torch and transformers,
which take seconds to import. So each registration waits until the module of transformers that it concerns is imported,
and carsam's own models are not imported before one is asked for.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from carsam.models.names import Names, all_names

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    Then = list[Callable[[], object]]

# Every model of transformers imports the first of these, and ``AutoConfig`` lies in the second.
MODELS, AUTOMATIC = "transformers.modeling_utils", "transformers.models.auto.configuration_auto"


def register_on_import() -> None:
    """Registers what concerns modules of transformers that are imported already, and the rest when they are."""
    then: dict[str, Then] = {MODELS: [_importing("carsam.pack.transformers")]}
    for names in all_names(plugins=False):
        for module, own in names.registers.items():
            then.setdefault(module, []).append(_importing(own))
        if names.configuration:
            then.setdefault(AUTOMATIC, []).append(lambda names=names: _register_configuration(names))
    for module in [module for module in then if module in sys.modules]:
        for register in then.pop(module):
            register()
    if then and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(then))


def _importing(module: str) -> Callable[[], object]:
    return lambda: importlib.import_module(module)


def _register_configuration(names: Names) -> None:
    """Has ``AutoConfig`` know a family's configuration; its module is imported when one is read or made."""
    auto = sys.modules[AUTOMATIC]
    module, _, name = names.configuration.rpartition(".")
    if module in sys.modules:
        return  # it registers itself

    def configuration() -> Any:
        return getattr(importlib.import_module(module), name)

    class Later:
        """Stands for the class until it is used; importing its module puts the class itself in this one's place."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return configuration()(*args, **kwargs)

        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
            return configuration().from_dict(*args, **kwargs)

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return configuration().from_pretrained(*args, **kwargs)

    for model_type in names.model_types:
        auto.AutoConfig.register(model_type, Later, exist_ok=True)


class _Finder:
    """Finds some modules as Python would, with a loader that registers something afterwards.

    Args:
        then: What to call after a module was imported, by its name.
    """

    def __init__(self, then: dict[str, Then]):
        self._then = then

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        # Once only: what follows, and every later import, goes the usual way.
        then = self._then.pop(fullname, None)
        if then is None:
            return None
        if not self._then:
            sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, then)
        return spec


class _Loader:
    """Loads a module as its own loader does, then registers something."""

    def __init__(self, own: Loader, then: Then):
        self._own, self._then = own, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Tools that read a module's source (inspect, torch.compile) ask its loader: they must find the usual one.
        module.__loader__ = self._own
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        self._own.exec_module(module)
        for register in self._then:
            register()
