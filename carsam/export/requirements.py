"""The optional packages of this room, and what to say where they are missing or too old."""

from __future__ import annotations

import importlib
import re

from carsam.errors import ConfigError

# The oldest that exported graphs were run with; those before 1.19 do not work with NumPy 2.
OLDEST_RUNTIME = (1, 20)
INSTALL = 'install the optional packages with pip install "carsam[onnx]"'


def require_onnx() -> None:
    """Checks that models can be written.

    Raises:
        ConfigError: onnx is not installed.
    """
    _require("onnx")


def require_runtime() -> None:
    """Checks that written models can be run here.

    Raises:
        ConfigError: ONNX Runtime is not installed, or too old for the graphs.
    """
    runtime = _require("onnxruntime")
    found = tuple(int(part) for part in re.findall(r"\d+", runtime.__version__)[:2])
    if found < OLDEST_RUNTIME:
        oldest = ".".join(map(str, OLDEST_RUNTIME))
        raise ConfigError(
            f"ONNX Runtime {runtime.__version__} is too old for the exported graphs, which need {oldest}; "
            f'update it with pip install -U "onnxruntime>={oldest}".'
        )


def _require(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{name} is not installed ({error}); {INSTALL}.") from None
