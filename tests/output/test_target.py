"""The output folder: what is refused, what is replaced, what comes back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from carsam.errors import CarsamError
from carsam.output.files import hidden
from carsam.output.lock import InUseError
from carsam.output.target import Output, foreign_files, replaced_folder


@pytest.fixture
def packed(packed_folder, tmp_path) -> Path:
    """A packed folder to replace."""
    return Path(shutil.copytree(packed_folder, tmp_path / "m"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_that_carsam_did_not_write_are_named_and_stay(packed):
    (packed / "notes.txt").write_text("mine")
    (packed / "more").mkdir()
    assert foreign_files(packed) == ["more", "notes.txt"]
    with pytest.raises(CarsamError, match=r"did not write.*more, notes\.txt"), replaced_folder(packed, True):
        pass
    assert (packed / "notes.txt").read_text() == "mine"


def test_a_folder_with_checksums_of_other_files_is_not_ours(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "SHA256SUMS").write_text("0" * 64 + "  disk.img\n")
    (folder / "disk.img").write_text("mine")
    with pytest.raises(CarsamError, match="not a packed model"), replaced_folder(folder, True):
        pass
    assert (folder / "disk.img").read_text() == "mine"


def test_what_carsam_writes_later_is_carsams(packed):
    (packed / "results.json").write_text("{}")
    (packed / "report.html").write_text("")
    (packed / "diagnosis" / "examples").mkdir(parents=True)
    (packed / "diagnosis" / "diagnosis.json").write_text(json.dumps({"picture": "examples/a.jpg"}))
    for name in ("a.jpg", "mine.jpg"):
        (packed / "diagnosis" / "examples" / name).write_text("")
    assert foreign_files(packed) == ["diagnosis/examples/mine.jpg"]


def test_a_link_stays_and_its_target_is_replaced(packed, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(packed)
    with replaced_folder(link, True) as temporary:
        (temporary / "new").write_text("new")
    assert link.is_symlink() and contents(packed) == {"new": b"new"}
    assert {path.name for path in tmp_path.iterdir()} == {"link", "m"}


def test_places_that_are_refused(tmp_path, monkeypatch):
    dangling, file = tmp_path / "dangling", tmp_path / "file"
    dangling.symlink_to(tmp_path / "nowhere")
    file.write_text("mine")
    model = tmp_path / "model"
    model.mkdir()
    for out, word in (
        (dangling, "does not exist"),
        (file, "exists already"),
        (file / "below", "cannot write"),
        ("/", "cannot be written"),
        (tmp_path, "current folder"),
        (model / "q", "lies in the model"),
        (model, "lies in the model"),
    ):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CarsamError, match=word), Output(out, inputs={"model": model}):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {"dangling", "file", "model"}
    assert file.read_text() == "mine" and not any(model.iterdir())


@pytest.mark.parametrize("failing", [1, 2])
def test_a_move_that_fails_puts_the_old_folder_back(failing, packed, tmp_path, monkeypatch):
    before, moves, replace = contents(packed), [], os.replace

    def broken(source, target):
        moves.append(source)
        if len(moves) == failing:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(CarsamError, match="still there"), replaced_folder(packed, True) as temporary:
        (temporary / "new").write_text("new")
    assert contents(packed) == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_death_between_the_moves_is_repaired_at_the_next_start(packed, tmp_path):
    before = contents(packed)
    os.replace(packed, hidden(packed, "4194303.old"))
    hidden(packed, "4194303.tmp").mkdir()
    with pytest.raises(CarsamError, match="exists already"), Output(packed):
        pass
    assert contents(packed) == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_only_one_at_a_time(tmp_path):
    out = tmp_path / "new" / "m"
    with Output(out), pytest.raises(InUseError, match=rf"process {os.getpid()}\)"), Output(out):
        pass
    assert not list(tmp_path.iterdir())
    # A lock file whose process has ended does not block.
    hidden(tmp_path / "m", "lock").write_text("4194303\n")
    with Output(tmp_path / "m"):
        pass
    assert not list(tmp_path.iterdir())
