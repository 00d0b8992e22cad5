"""A lock that a process holds on a place, and that ends with the process however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from carsam.errors import CarsamError


class InUseError(CarsamError):
    """Another process works on the same place."""


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds the lock file ``path`` while the block runs; the file is removed afterwards.

    The operating system frees the lock of a process that has ended, so a file that a killed process left does not
    block.

    Args:
        path: The lock file; its folder must exist.
        what: What is locked, for the message.

    Raises:
        InUseError: Another process holds it, with that process's number.
        OSError: The file cannot be written.
    """
    while True:
        before = _identity(path, create=True)
        lock = filelock.FileLock(path, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise InUseError(
                f"{what} is being written by another carsam{_holder(path)}. Wait for it, stop it, or choose another "
                "folder."
            ) from None
        # The holder before may have removed the file between our opening and our locking it: then the lock is on a
        # file that nobody else sees.
        if before == _identity(path):
            break
        lock.release()
    try:
        path.write_text(f"{os.getpid()}\n", encoding="ascii")
        yield
    finally:
        if os.name == "posix":
            with suppress(OSError):
                path.unlink()  # while it is held, so that nobody else's file is removed
        lock.release()
        if os.name != "posix":
            with suppress(OSError):
                path.unlink()  # Windows removes no open file


def _identity(path: Path, *, create: bool = False) -> tuple[int, int] | None:
    if create:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o666))
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _holder(path: Path) -> str:
    try:
        pid = path.read_bytes()[:20].strip()
    except OSError:
        return ""
    return f" (process {pid.decode()})" if pid.isdigit() else ""
