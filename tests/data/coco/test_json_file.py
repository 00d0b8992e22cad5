"""Encodings and formats in which annotation files come."""

import bz2
import gzip
import json

import pytest

from carsam.data.coco import json_file
from carsam.data.coco.json_file import read_json
from carsam.errors import DataError

VALUE = {"name": "猫 ü", "ids": [1, 2]}
TEXT = json.dumps(VALUE, ensure_ascii=False)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("packed", [False, True])
def test_encodings(tmp_path, encoding, packed):
    data = TEXT.encode(encoding)
    (tmp_path / "a.json").write_bytes(gzip.compress(data, mtime=0) if packed else data)
    assert read_json(tmp_path / "a.json") == VALUE


def test_gzip_in_parts(tmp_path):
    data = TEXT.encode()
    (tmp_path / "a.json").write_bytes(gzip.compress(data[:9], mtime=0) + gzip.compress(data[9:]))
    assert read_json(tmp_path / "a.json") == VALUE


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TEXT.encode("gbk", "ignore"), "may be GBK.*iconv"),
        (b'{"a": "\xff\xfe\xff"}', "not UTF-8"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'{"a": 1', "is the file complete"),
        (b'{"a": 1}\n{"a": 2}', "JSON lines"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"id": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (gzip.compress(TEXT.encode(), mtime=0)[:-9], "gzip file that was cut off"),
        (gzip.compress(b"x" * 900, mtime=0)[:12] + b"\0" * 40, "gzip"),
        (bz2.compress(TEXT.encode()), "bunzip2"),
        (b"PK\x03\x04...", "zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<annotation><object>", "Pascal VOC"),
        (b"\x89PNG\r\n", "is an image"),
    ],
)
def test_what_is_no_json(tmp_path, data, message):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_json(tmp_path / "a.json")


def test_a_gzip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(json_file, "MAX_BYTES", 10_000)
    (tmp_path / "a.json").write_bytes(gzip.compress(b" " * 10_000_000 + b"1", mtime=0))
    with pytest.raises(DataError, match=r"unpacks to more"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b.json").write_bytes(b" " * 10_001)
    with pytest.raises(DataError, match=r"larger than"):
        read_json(tmp_path / "b.json")


def test_no_file(tmp_path):
    for path, message in (("none.json", "no file"), ("", "is a folder"), ("x" * 300, "cannot read"), ("a\0b", "read")):
        with pytest.raises(DataError, match=message):
            read_json(tmp_path / path)
    with pytest.raises(DataError, match=r"is a device"):
        read_json("/dev/zero")
