"""Files, folders and patterns."""

import os
from pathlib import Path

import pytest

from carsam.errors import DataError
from carsam.predict.inputs import find_photos, measure, shown


def names(*inputs):
    return [photo.path.name for photo in find_photos([str(text) for text in inputs])]


def test_files_folders_and_patterns(photos):
    assert names(photos) == ["a.jpg", "a.png", "b.jpg"]
    assert names(photos / "b.jpg", photos) == ["b.jpg", "a.jpg", "a.png"]  # each once, in the order given
    assert names(photos / "*.jpg") == ["a.jpg", "b.jpg"]
    assert names(photos / "?.png") == ["a.png"]
    (photos / "notes.txt").write_text("no image")
    assert names(photos / "*") == ["a.jpg", "a.png", "b.jpg"]
    # A name with brackets is a file before it is a pattern.
    (photos / "b.jpg").rename(photos / "b[1].jpg")
    assert names(photos / "b[1].jpg") == ["b[1].jpg"]


def test_subfolders_of_a_pattern(photos):
    (photos / "deep" / "er").mkdir(parents=True)
    (photos / "a.png").rename(photos / "deep" / "er" / "a.png")
    found = {str(photo.path.relative_to(photos)): str(photo.subfolder) for photo in find_photos([f"{photos}/**/a.*"])}
    assert found == {"a.jpg": ".", "deep/er/a.png": "deep/er"}


def test_the_home_folder(photos, monkeypatch):
    monkeypatch.setenv("HOME", str(photos))
    monkeypatch.setenv("USERPROFILE", str(photos))
    assert names("~/a.png") == ["a.png"]
    assert names("~/*.png") == ["a.png"]


@pytest.mark.parametrize("text", ["none.jpg", "none/*.jpg", "n" * 300, "a\0b", ""])
def test_nothing_there(text, photos):
    with pytest.raises(DataError, match=r"there is no image or folder|no image matches"):
        find_photos([text])


def test_sizes_and_unreadable_files(photos):
    (photos / "bad.jpg").write_bytes(b"no image")
    good, bad = measure(find_photos([str(photos)]))
    assert [photo.size for photo in good] == [(64, 96)] * 3
    assert [photo.path.name for photo, _ in bad] == ["bad.jpg"] and "bad.jpg" in bad[0][1]


def test_any_name_can_be_printed():
    assert shown(Path("a\nb.jpg")) == "a\N{REPLACEMENT CHARACTER}b.jpg"
    assert "\N{REPLACEMENT CHARACTER}" in shown(os.fsdecode(b"caf\xe9.jpg"))
