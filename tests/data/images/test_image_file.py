"""Which files are images, how large they may be, and what other files are."""

import sys
import types
import warnings

import numpy as np
import pytest
from PIL import Image, features

from carsam.data.images import file as image_file
from carsam.data.images.file import check_whole, read_header
from carsam.data.images.reading import list_images, read_image
from carsam.errors import DataError

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + b"\0" * 40


def picture(height=24, width=32):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([y * 9, x * 7, y + x], axis=-1).astype(np.uint8))


SUFFIXES = ["jfif", "jpe", "JPG", "jp2", "pgm", "pbm", "pnm", "tga", "bmp", "gif", "tiff", "webp", "ico", "dib", "pcx"]


@pytest.mark.parametrize("suffix", [*SUFFIXES, *(["avif"] if features.check("avif") else [])])
def test_what_is_opened_is_listed(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    picture().save(tmp_path / "a.png")
    picture().convert("L" if suffix == "pgm" else "1" if suffix == "pbm" else "RGB").save(path)
    assert list_images(tmp_path) == sorted([path, tmp_path / "a.png"])
    assert read_image(path).shape == (24, 32, 3) or suffix == "ico"


def test_images_with_an_unknown_suffix_or_none(tmp_path, caplog):
    for name in ("photo", "photo.jpg_large", "photo.dat"):
        picture().save(tmp_path / name, format="JPEG")
    (tmp_path / "notes").write_text("no image")
    (tmp_path / "labels.txt").write_text("0 0.5 0.5 1 1")
    assert [path.name for path in list_images(tmp_path)] == ["photo", "photo.dat", "photo.jpg_large"]
    assert not caplog.records


def test_photographs_that_cannot_be_read_are_counted(tmp_path, caplog):
    for name in ("a.heic", "b.HEIC", "c.cr2"):
        (tmp_path / name).write_bytes(HEIC)
    with pytest.raises(
        DataError, match=r"holds no images; accepted are .*\.jpg.* It holds 2 \.heic, 1 \.cr2: .*pillow-heif"
    ):
        list_images(tmp_path)
    picture().save(tmp_path / "d.png")
    assert len(list_images(tmp_path)) == 1
    assert len(caplog.records) == 1 and "2 .heic, 1 .cr2; install pillow-heif" in caplog.text


def test_pillow_heif_is_used_where_it_is_installed(monkeypatch):
    calls = []
    plugin = types.SimpleNamespace(register_heif_opener=lambda: calls.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    image_file._register_heif.cache_clear()
    image_file._register_heif()
    image_file._register_heif()
    image_file._register_heif.cache_clear()
    assert calls == [1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (HEIC, "HEIC photograph; install pillow-heif"),
        (b"", "the file is empty"),
        (b"%PDF-1.7", "a PDF file"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"<svg xmlns=''>", "an SVG drawing"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"\0" * 128 + b"DICM" + b"\0" * 99, "a DICOM file"),
        (b"\xff\x0a" + b"\0" * 99, "JPEG XL"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, data, message):
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_image(tmp_path / "a.jpg")


def test_pillows_limit_does_not_hold(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "a.png").shape == (24, 32, 3)
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "a.png")


def test_carsams_own_limit_is_checked_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(image_file, "MAX_PIXELS", 700)
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"a.png has 32 × 24 pixels, .* Make it smaller, or cut it into tiles"):
        read_image(tmp_path / "a.png")


@pytest.mark.slow
def test_an_image_of_182_megapixels(tmp_path):
    Image.new("RGB", (14000, 13000), (9, 8, 7)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape == (13000, 14000, 3)


def test_headers(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "a.jpg", exif=exif)
    header = read_header(tmp_path / "a.jpg")
    assert (header.size, header.upright_size, header.orientation, header.wide) == ((24, 32), (32, 24), 6, False)
    Image.fromarray(np.zeros((24, 32), np.uint16)).save(tmp_path / "a.png")
    assert read_header(tmp_path / "a.png").wide
    exif[0x0112] = 77
    picture().save(tmp_path / "a.jpg", exif=exif)
    assert read_header(tmp_path / "a.jpg").orientation == 1


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_whole_files(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    picture(200, 300).save(path)
    for decode in (True, False):
        check_whole(path, decode=decode)
    path.write_bytes(path.read_bytes() + b"trailing bytes")
    for decode in (True, False):
        check_whole(path, decode=decode)


def test_odd_paths(tmp_path):
    for path, message in ((tmp_path / ("x" * 300), "no image"), (tmp_path, "is no file"), ("a\0b", "no image")):
        with pytest.raises(DataError, match=message):
            read_image(path)
