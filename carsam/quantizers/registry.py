"""All grids by name: those of this folder, of plugins, and of every subclass that Python knows."""

from __future__ import annotations

from carsam.plugins import named_subclasses
from carsam.quantizers.site import SiteQuantizer
from carsam.quantizers.softmax import SoftmaxQuantizer

_PACKAGE = "carsam.quantizers"


def activation_grids() -> dict[str, type[SiteQuantizer]]:
    """Grids of layers' inputs and of query, key and value.

    Raises:
        ConfigError: Two grids have one name.
    """
    return named_subclasses(
        SiteQuantizer,
        "grid",
        _PACKAGE,
        what="activation grid",
        counts=lambda cls: not issubclass(cls, SoftmaxQuantizer),
    )


def softmax_grids() -> dict[str, type[SoftmaxQuantizer]]:
    """Grids of softmax outputs.

    Raises:
        ConfigError: Two grids have one name.
    """
    return named_subclasses(SoftmaxQuantizer, "grid", _PACKAGE, what="softmax grid")
