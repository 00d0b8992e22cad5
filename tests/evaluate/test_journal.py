"""Interrupted evaluations: what is kept, what is used again, and that the numbers are those of a single run."""

import json
import os
import shutil
import time

import pytest
import torch
from places import EVALUATION_COCO, EVALUATION_IMAGES

from carsam.errors import DataError
from carsam.evaluate import coco_metrics, points
from carsam.evaluate.coco_metrics import evaluate_coco
from carsam.evaluate.journal import Journals
from carsam.evaluate.points import evaluate_points

N_IMAGES = 4


@pytest.fixture
def data(tmp_path):
    """Annotations and a few images that may be changed."""
    content = json.loads(EVALUATION_COCO.read_text())
    content["images"] = content["images"][:N_IMAGES]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    (tmp_path / "c.json").write_text(json.dumps(content))
    (tmp_path / "images").mkdir()
    for image in content["images"]:
        shutil.copy(EVALUATION_IMAGES / image["file_name"], tmp_path / "images")
    return tmp_path / "c.json", tmp_path / "images"


@pytest.fixture
def encoded(monkeypatch):
    """Counts the images that go through the encoder."""
    calls = []
    for module in (coco_metrics, points):
        encode = module.encode_image

        def counted(model, pixels, encode=encode):
            calls.append(1)
            return encode(model, pixels)

        monkeypatch.setattr(module, "encode_image", counted)
    return calls


def stop_after(count):
    def progress(done, _):
        if done == count:
            raise KeyboardInterrupt

    return progress


def interrupted(evaluate, model, data, folder, count=2):
    with pytest.raises(KeyboardInterrupt), Journals(folder) as journals:
        evaluate(model, *data, journals=journals, progress=stop_after(count))
    return next(folder.glob("*/images.jsonl"))


@pytest.mark.parametrize("evaluate", [evaluate_coco, evaluate_points])
def test_resumed_is_uninterrupted(evaluate, nano, data, tmp_path, encoded):
    whole = evaluate(nano, *data)
    folder = tmp_path / "cache"
    interrupted(evaluate, nano, data, folder)
    encoded.clear()
    notes = []
    with Journals(folder, note=notes.append) as journals:
        resumed = evaluate(nano, *data, journals=journals)
        assert journals.kept == (N_IMAGES, N_IMAGES)
    assert resumed == whole
    assert len(encoded) == N_IMAGES - 2
    assert notes == ["2 of 4 images are kept from an interrupted evaluation"]
    assert not folder.exists()


def test_damaged_lines_are_computed_again(nano, data, tmp_path, encoded):
    """A flipped digit and a line cut off: both have a wrong checksum."""
    whole = evaluate_coco(nano, *data)
    lines = interrupted(evaluate_coco, nano, data, tmp_path / "cache", 3)
    first, second, third = lines.read_bytes().splitlines(keepends=True)
    place = first.rindex(b".") + 3
    digit = b"1" if first[place : place + 1] != b"1" else b"2"
    lines.write_bytes(first[:place] + digit + first[place + 1 :] + second + third[: len(third) // 2])
    encoded.clear()
    with Journals(tmp_path / "cache") as journals:
        assert evaluate_coco(nano, *data, journals=journals) == whole
    assert len(encoded) == N_IMAGES - 1


def test_after_a_cut_line_the_next_ones_count(nano, data, tmp_path, encoded):
    lines = interrupted(evaluate_coco, nano, data, tmp_path / "cache", 1)
    lines.write_bytes(lines.read_bytes()[:-20])
    interrupted(evaluate_coco, nano, data, tmp_path / "cache", 3)
    encoded.clear()
    with Journals(tmp_path / "cache") as journals:
        evaluate_coco(nano, *data, journals=journals)
    assert len(encoded) == N_IMAGES - 3


def test_restart_discards(nano, data, tmp_path, encoded):
    interrupted(evaluate_coco, nano, data, tmp_path / "cache")
    encoded.clear()
    with Journals(tmp_path / "cache", restart=True) as journals:
        evaluate_coco(nano, *data, journals=journals)
    assert len(encoded) == N_IMAGES


def test_another_image_at_the_same_path(nano, data, tmp_path, encoded):
    interrupted(evaluate_coco, nano, data, tmp_path / "cache", N_IMAGES)
    name = json.loads(data[0].read_text())["images"][1]["file_name"]
    # The same picture in other bytes: what decides is the contents, not the name, size or time.
    from PIL import Image

    with Image.open(data[1] / name) as image:
        image.save(data[1] / name, "PNG")
    whole = evaluate_coco(nano, *data)
    encoded.clear()
    with Journals(tmp_path / "cache") as journals:
        assert evaluate_coco(nano, *data, journals=journals) == whole
    assert len(encoded) == 1


def test_what_differs_is_named(fresh_nano, nano, data, tmp_path, encoded):
    interrupted(evaluate_coco, nano, data, tmp_path / "cache")
    with torch.no_grad():
        next(fresh_nano.parameters()).view(-1)[0] += 0.5
    edited = json.loads(data[0].read_text())
    edited["annotations"][0]["bbox"][2] -= 3
    other = tmp_path / "other.json"
    other.write_text(json.dumps(edited))
    cases = [
        (fresh_nano, data[0], {}, "another model"),
        (nano, other, {}, "another annotation file"),
        (nano, data[0], {"limit": 3}, "another settings"),
        (fresh_nano, other, {}, "another model and annotation file"),
    ]
    for model, coco, settings, words in cases:
        notes = []
        encoded.clear()
        with pytest.raises(KeyboardInterrupt), Journals(tmp_path / "cache", note=notes.append) as journals:
            evaluate_coco(model, coco, data[1], journals=journals, progress=stop_after(1), **settings)
        assert len(encoded) == 1 and len(notes) == 1 and words in notes[0]
        shutil.rmtree(max((tmp_path / "cache").iterdir(), key=lambda path: path.stat().st_ctime_ns))


def test_an_unreadable_image_in_the_middle(nano, data, tmp_path, monkeypatch, encoded):
    whole = evaluate_coco(nano, *data)
    from carsam.data.coco.ground_truth import GroundTruth

    read = GroundTruth.read_image

    def failing(self, index):
        if index == 2:
            raise DataError("cannot read the image third.jpg: the disk went away.")
        return read(self, index)

    monkeypatch.setattr(GroundTruth, "read_image", failing)
    folder = tmp_path / "cache"
    with pytest.raises(DataError, match=r"third.jpg.* 2 of 4 images are kept"), Journals(folder) as journals:
        evaluate_coco(nano, *data, journals=journals)
    monkeypatch.undo()
    with Journals(folder) as journals:
        assert evaluate_coco(nano, *data, journals=journals) == whole


def test_a_cache_that_cannot_be_written(nano, data, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with Journals(tmp_path / "file" / "evaluations") as journals:
        assert evaluate_coco(nano, *data, journals=journals) == evaluate_coco(nano, *data)
    assert "cannot keep finished images" in caplog.text and "CARSAM_CACHE" in caplog.text


def test_a_disk_that_fills_up(nano, data, tmp_path, caplog):
    full = OSError(28, "No space left on device")

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, _):
            raise full

        def __getattr__(self, name):
            return getattr(self.file, name)

    class FullJournals(Journals):
        def open(self, parts, n_images):
            opened = super().open(parts, n_images)
            opened._file = Full(opened._file)
            return opened

    with FullJournals(tmp_path / "cache") as journals:
        assert evaluate_coco(nano, *data, journals=journals) == evaluate_coco(nano, *data)
    assert caplog.text.count("No space left") == 1


def test_two_at_once(nano, data, tmp_path, caplog):
    with Journals(tmp_path / "cache") as first, Journals(tmp_path / "cache") as second:

        def progress(done, _):
            if done == 2:
                assert evaluate_coco(nano, *data, journals=second).n_images == N_IMAGES

        result = evaluate_coco(nano, *data, journals=first, progress=progress)
        assert first.kept == (N_IMAGES, N_IMAGES)
    assert "another carsam runs the same evaluation" in caplog.text
    assert result == evaluate_coco(nano, *data)


def test_old_journals_go_and_nothing_else(nano, data, tmp_path):
    """Also where the cache is a folder in which somebody keeps files of their own."""
    folder = tmp_path / "cache"
    lines = interrupted(evaluate_coco, nano, data, folder)
    others = [folder / "a" / "images.jsonl", folder / ("0" * 32) / "images.jsonl", lines.parent / "thesis.tex"]
    month = time.time() - 32 * 24 * 3600
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("years of work")
    for path in (lines, *others):
        os.utime(path, (month, month))
    with Journals(folder) as journals:
        evaluate_coco(nano, *data, limit=1, journals=journals)
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(others)
