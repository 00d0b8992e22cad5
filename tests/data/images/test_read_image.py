"""Reading of odd and broken image files."""

import logging
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from carsam.data.images.reading import SkippedImage, list_images, log_skipped, read_image, require_images
from carsam.errors import DataError


def gradient(height=6, width=9):
    """(H, W, 3) uint8 in which every pixel differs."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 20, x * 20, (y + x) * 10], axis=-1).astype(np.uint8)


@pytest.fixture
def save(tmp_path):
    def _save(image, name="image.png", **options):
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return _save


def test_rgb_is_read_as_stored(save):
    assert np.array_equal(read_image(save(Image.fromarray(gradient()))), gradient())


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(save, mode):
    image = Image.fromarray(gradient()).convert(mode)
    read = read_image(save(image, "image.tif"))
    assert read.shape == (6, 9, 3) and read.dtype == np.uint8
    assert np.abs(read.astype(int) - np.array(image.convert("RGB")).astype(int)).max() <= 3


def test_grey_has_three_equal_channels(save):
    read = read_image(save(Image.fromarray(gradient()[..., 0])))
    assert np.array_equal(read, np.repeat(gradient()[..., :1], 3, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white(save, mode):
    image = Image.new(mode, (2, 1), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    image.putpixel((1, 0), (10, 10, 10, 255) if mode == "RGBA" else (10, 255))
    assert read_image(save(image)).tolist() == [[[255] * 3, [10] * 3]]


def test_palette_transparency_is_composited_on_white(save):
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 50, 60, 70])
    image.putpixel((1, 0), 1)
    assert read_image(save(image, transparency=0)).tolist() == [[[255] * 3, [50, 60, 70]]]


@pytest.mark.parametrize("name", ["image.png", "image.tif"])
def test_16_bit_values_are_scaled_not_clipped(save, name):
    values = np.array([[0, 128, 256, 257, 32768, 65535]], dtype=np.uint16)
    read = read_image(save(Image.fromarray(values), name))
    assert read[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_float_pixels_have_no_range(save):
    with pytest.raises(DataError, match="8 or 16 bits"):
        read_image(save(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "image.tif"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(save, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(gradient()), exif=exif)
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a),
    }[orientation](gradient())
    assert np.array_equal(read_image(path), turned)
    assert np.array_equal(read_image(path, apply_exif=False), gradient())


def test_damaged_exif_does_not_matter(save):
    read = read_image(save(Image.fromarray(gradient()), "image.jpg", exif=b"Exif\x00\x00garbage"))
    assert read.shape == (6, 9, 3)


def broken_files(folder):
    """Files that are no readable image, by kind."""
    whole = folder / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    Image.open(whole).save(folder / "whole.png")
    jpeg, png = whole.read_bytes(), (folder / "whole.png").read_bytes()
    whole.unlink()
    (folder / "whole.png").unlink()
    return {
        "empty.jpg": b"",
        "text.png": b"this is no image",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[: len(png) // 2],
        "header.png": png[:20] + struct.pack(">I", 0) + png[24:],
    }


@pytest.mark.parametrize("kind", ["empty.jpg", "text.png", "cut.jpg", "cut.png", "header.png"])
def test_damaged_files(tmp_path, kind):
    path = tmp_path / kind
    path.write_bytes(broken_files(tmp_path)[kind])
    with pytest.raises(DataError, match=kind):
        read_image(path)


def test_missing_file_and_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(DataError, match=r"no image .*none\.png"):
        read_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="cannot read"):
        read_image(tmp_path)


def test_list_images_sorts_and_filters(tmp_path):
    for name in ("b.JPG", "a.png", "c.webp", "notes.txt", "._a.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in list_images(tmp_path)] == ["a.png", "b.JPG", "c.webp"]


def test_list_images_errors(tmp_path):
    with pytest.raises(DataError, match="no image folder"):
        list_images(tmp_path / "none")
    with pytest.raises(DataError, match=r"no images; accepted are .*\.jpg"):
        list_images(tmp_path)
    (tmp_path / "file.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="is a file"):
        list_images(tmp_path / "file.jpg")


def test_skipped_images_are_counted_and_too_few_are_refused(caplog):
    skipped = [SkippedImage(Path(f"{name}.png"), f"{name}.png is no image.") for name in "abcd"]
    with caplog.at_level(logging.WARNING):
        log_skipped(skipped)
    assert "4 images skipped: a.png is no image; b.png is no image; c.png is no image; and 1 more." in caplog.text
    require_images(2, 2, skipped)
    with pytest.raises(DataError, match=r"only 1 usable images in x, at least 2 are needed; 1 were skipped \(a\.png"):
        require_images(1, 2, skipped[:1], where="x")
