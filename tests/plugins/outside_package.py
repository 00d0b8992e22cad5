"""What tests of packages from outside share: a folder as pip would leave it, and a Python that has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def announce(folder: Path, package: str, module: str) -> Path:
    """A folder as pip would leave it: the module lies in it, and metadata that names it."""
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[carsam]\n{package} = {module}\n")
    return folder


def python(*arguments: object, path: tuple[Path, ...] | list[Path] = (), code: int = 0) -> tuple[str, str]:
    """Runs Python with folders on ``sys.path``; its stdout and stderr."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, done.stderr
