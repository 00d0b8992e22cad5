"""Parts that are found instead of listed: modules of a folder, and packages that announce themselves.

A package announces itself in its ``pyproject.toml``; the module it names is imported once, and defining a method or a
grid there is all that is needed::

    [project.entry-points.carsam]
    my-grids = "my_package.grids"
"""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from carsam.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "carsam"
T = TypeVar("T")

logger = logging.getLogger(__name__)
_loaded: set[tuple[str, str]] = set()


def load_plugins() -> None:
    """Imports what installed packages announce under the entry-point group ``carsam``, each once.

    A plugin that cannot be imported is left out with a warning: everything else goes on without it.
    """
    for entry in _announced():
        key = (entry.name, entry.value)
        if key in _loaded:
            continue
        # Noted before it is imported: a plugin may ask for a registry itself.
        _loaded.add(key)
        try:
            entry.load()
        except Exception as error:  # whatever a stranger's module does when it is imported
            logger.warning(
                "the plugin %s (%s)%s cannot be loaded and is left out: %s: %s",
                entry.name,
                entry.value,
                _distribution(entry),
                type(error).__name__,
                error,
            )


@functools.cache
def _announced() -> tuple[EntryPoint, ...]:
    from importlib.metadata import entry_points  # takes a while to import, and the help needs no registry

    # Reading what every installed package says of itself takes milliseconds; registries are asked often.
    return tuple(entry_points(group=GROUP))


def _distribution(entry: EntryPoint) -> str:
    return f" of the package {entry.dist.name}" if entry.dist is not None else ""


@functools.cache  # the folder does not change, and registries are asked at every prediction
def import_modules(package: str, module: str = "") -> None:
    """Imports every module of a package's folder; with ``module``, the one of that name in every folder below it."""
    parent = importlib.import_module(package)
    for found in pkgutil.iter_modules(parent.__path__):
        if not module:
            importlib.import_module(f"{package}.{found.name}")
        elif found.ispkg and any((Path(place) / found.name / f"{module}.py").is_file() for place in parent.__path__):
            importlib.import_module(f"{package}.{found.name}.{module}")


def named_subclasses(
    base: type[T],
    attribute: str,
    package: str,
    *,
    what: str,
    counts: Callable[[type[Any]], bool] = lambda _cls: True,
    module: str = "",
    plugins: bool = True,
) -> dict[str, type[T]]:
    """All subclasses that carry a name of their own, wherever they are defined.

    Args:
        base: Their common base.
        attribute: Class attribute that holds the name; inherited ones do not count.
        package: Package whose modules are imported first.
        what: What they are, for messages.
        counts: Whether a class counts.
        module: Imports the module of this name in every folder of the package instead.
        plugins: Whether to load plugins as well.

    Returns:
        Classes by name, in the order of the names. Of a class that was defined again (a notebook's cell run twice) it
        is the last.

    Raises:
        ConfigError: Two of them have one name.
    """
    import_modules(package, module)
    if plugins:
        load_plugins()
    found: dict[str, type[T]] = {}
    pending = list(base.__subclasses__())
    for cls in pending:  # grows while it is gone through
        pending += [below for below in cls.__subclasses__() if below not in pending]
        name = cls.__dict__.get(attribute)
        if not name or not counts(cls):
            continue
        if name in found and _place(found[name]) != _place(cls):
            raise ConfigError(
                f"two {what}s are called {name!r}: {_place(found[name])} and {_place(cls)}; rename one of them, or "
                "uninstall the package that brings it."
            )
        found[name] = cls
    return dict(sorted(found.items()))


def outside_sources(classes: Iterable[type[Any]]) -> list[tuple[str, Path]]:
    """Source files of what other packages define: their numbers hang on these as ours on our own.

    Args:
        classes: Families, methods and grids; those of carsam itself do not count.

    Returns:
        (name, file) of every module of a package that defines one of them, or of a module that stands alone; sorted.
    """
    found = {}
    for top in {cls.__module__.partition(".")[0] for cls in classes} - {__name__.partition(".")[0]}:
        module = sys.modules.get(top)
        for folder in map(Path, getattr(module, "__path__", ())):
            found.update({f"{top}/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*.py")})
        file = getattr(module, "__file__", None)  # a notebook has none
        if file is not None and Path(file).suffix == ".py":
            found.setdefault(f"{top}/{Path(file).name}", Path(file))
    return sorted(found.items())


def _place(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
