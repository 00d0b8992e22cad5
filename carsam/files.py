"""Files that appear whole: written under a temporary name beside their place, then moved there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from carsam.errors import CarsamError


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to; it takes the place of ``path`` when the block ends without an error.

    The folder is created where it is missing. What was at ``path`` is replaced at once or not at all, and the new file
    has the mode that the umask says, whatever the writer gave it (safetensors gives 0600).

    Raises:
        CarsamError: The disk is full, or the place is not writable.
    """
    path = Path(path)
    temporary = path.with_name(f".carsam-{path.name[:100]}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.chmod(0o666 & ~current_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise CarsamError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def current_umask() -> int:
    """The process's umask; reading it means setting it for a moment."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text whole or not at all.

    Raises:
        CarsamError: See :func:`whole_file`.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, values: Any) -> None:
    """Writes JSON whole or not at all; numbers that are not finite are refused, since JSON has none.

    Raises:
        CarsamError: See :func:`whole_file`.
        ValueError: A number is not finite.
    """
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
