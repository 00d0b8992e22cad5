"""Files that appear whole: written under a temporary name beside their place, then moved there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from carsam.errors import CarsamError

LEFTOVER = re.compile(r"\.carsam-.*\.(\d+)\.tmp", re.DOTALL)
# Begins the name of a folder for cached activations; the number of its process follows.
SPILL = "carsam-cache-"
_cleared: set[Path] = set()


def hidden(path: Path, end: str) -> Path:
    """A name beside ``path`` that only carsam uses: ``.carsam-NAME.END``, with a long name shortened."""
    name = path.name
    if len(os.fsencode(name)) > 150:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        name = f"{os.fsencode(name)[:100].decode(errors='ignore')}-{digest}"
    return path.with_name(f".carsam-{name}.{end}")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to; it takes the place of ``path`` when the block ends without an error.

    The folder is created where it is missing. What was at ``path`` is replaced at once or not at all, and the new file
    has the mode that the umask says, whatever the writer gave it (safetensors gives 0600). Temporary files that killed
    processes left in the folder are removed.

    Raises:
        CarsamError: The disk is full, or the place is not writable.
    """
    path = Path(path)
    temporary = hidden(path, f"{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path.parent)
        yield temporary
        temporary.chmod(0o666 & ~current_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise CarsamError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Removes temporary files of processes that have ended, once a process and folder."""
    folder = folder.absolute()
    if folder in _cleared:
        return
    _cleared.add(folder)
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = LEFTOVER.fullmatch(entry.name)
            if match and entry.is_file(follow_symlinks=False) and not is_running(int(match[1])):
                with suppress(OSError):
                    os.unlink(entry.path)


def clear_spills() -> None:
    """Removes the folders for cached activations that killed processes left in the temporary folder."""
    with suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            match = re.fullmatch(rf"{SPILL}(\d+)-\w+", entry.name)
            if match and entry.is_dir(follow_symlinks=False) and not is_running(int(match[1])):
                shutil.rmtree(entry.path, ignore_errors=True)


def is_running(pid: int) -> bool:
    """Whether a process of that number runs (where that cannot be told: True)."""
    if os.name != "posix":
        return True  # os.kill would end it there
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


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
