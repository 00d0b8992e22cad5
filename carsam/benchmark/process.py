"""The parent's side of a subject's process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from carsam.errors import CarsamError


class SubjectError(CarsamError):
    """A subject cannot be measured here; its row says why."""


class SubjectProcess:
    """A subject in a process of its own; use it as a context manager.

    Args:
        spec: What :mod:`carsam.benchmark.worker` opens.

    Raises:
        SubjectError: It cannot be opened.

    Attributes:
        seconds: That opening took.
    """

    def __init__(self, spec: dict[str, Any]):
        environment = {**os.environ, "OMP_NUM_THREADS": str(spec["threads"])}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "carsam.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )
        try:
            self.seconds = float(self._ask(do="open", spec=spec)["seconds"])
        except BaseException:
            self.close()
            raise

    def run(self, half: str, inputs: dict[str, np.ndarray], *, keep: bool = False) -> tuple[float, dict]:
        """Runs ``encoder`` or ``decoder``.

        Returns:
            Milliseconds, and the outputs by name where they are kept.

        Raises:
            SubjectError: It failed.
        """
        found = self._ask(do=half, inputs=inputs, keep=keep)
        return found["ms"], found["outputs"]

    def peak_bytes(self) -> int:
        """The most memory that the process has had."""
        return int(self._ask(do="memory")["bytes"])

    def close(self) -> None:
        """Ends the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> SubjectProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        try:
            pickle.dump(request, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
            found = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise SubjectError(f"its process ended ({self._last_words()})") from None
        if "error" in found:
            raise SubjectError(found["error"])
        return found

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        code = self._process.poll()
        return lines[-1][:300] if lines else f"exit status {code}"


class RemoteSession:
    """A half of a subject's process as a session of :class:`carsam.runtime.halves.Halves`.

    Args:
        process: The subject's.
        half: ``encoder`` or ``decoder``.
        names: Of the outputs, in order.
    """

    def __init__(self, process: SubjectProcess, half: str, names: tuple[str, ...]):
        self.process, self.half, self.names = process, half, names

    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs in order."""
        _, outputs = self.process.run(self.half, inputs, keep=True)
        return [outputs[name] for name in self.names]
