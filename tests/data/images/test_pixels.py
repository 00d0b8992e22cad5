"""More than 8 bits a channel: scaled by the bits that are used."""

import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from carsam.data.images import pixels
from carsam.data.images.reading import read_image
from carsam.data.notes import Notes
from carsam.errors import DataError


def ramp(largest, shape=(4, 64)):
    """(H, W) uint16 from 0 to ``largest``."""
    return np.linspace(0, largest, shape[0] * shape[1]).round().astype(np.uint16).reshape(shape)


def png(values, significant=None):
    """A 16-bit PNG of (H, W) or (H, W, C) values; Pillow writes grey ones only."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    bits = chunk(b"sBIT", bytes([significant] * channels)) if significant else b""
    body = chunk(b"IHDR", header) + bits + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def scaled(values, bits):
    return np.round(values.astype(float) * 255 / (2**bits - 1))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jp2"])
@pytest.mark.parametrize(("largest", "bits"), [(200, 8), (255, 8), (256, 10), (1023, 10), (4000, 12), (16383, 14)])
def test_grey_is_scaled_by_its_range(tmp_path, caplog, name, largest, bits):
    values = ramp(largest)
    Image.fromarray(values).save(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        read = read_image(tmp_path / name)
    assert np.abs(read - scaled(values, bits)[..., None]).max() <= (1 if name == "a.jp2" else 0.5)
    assert f"{name}: its pixels use {bits} of 16 bits and were scaled by {2**bits - 1}" in caplog.text


@pytest.mark.parametrize("largest", [16384, 65535])
def test_full_range_is_as_before(tmp_path, caplog, largest):
    values = ramp(largest)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png")[..., 0], (values.astype(int) * 255 + 32767) // 65535)
    assert not caplog.records


def test_stated_bits_count(tmp_path):
    dark = ramp(200)
    (tmp_path / "a.png").write_bytes(png(dark, significant=12))
    assert np.array_equal(read_image(tmp_path / "a.png")[..., 0], scaled(dark, 12))
    # Values that exceed the stated bits were scaled up to 16, as the PNG standard asks.
    (tmp_path / "b.png").write_bytes(png(ramp(65520), significant=12))
    bright = read_image(tmp_path / "b.png")
    assert bright.max() == 255 and bright.mean() == pytest.approx(127, abs=1)
    for tag in (281, 341):
        info = TiffImagePlugin.ImageFileDirectory_v2()
        info[tag] = 4095
        info.tagtype[tag] = 3
        Image.fromarray(dark).save(tmp_path / f"{tag}.tif", tiffinfo=info)
        assert np.array_equal(read_image(tmp_path / f"{tag}.tif")[..., 0], scaled(dark, 12))


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize(("largest", "bits"), [(200, 8), (1023, 10), (4000, 12), (16383, 14)])
def test_colour_is_scaled_by_its_range(tmp_path, caplog, channels, largest, bits):
    values = np.stack([ramp(largest), ramp(largest)[::-1], ramp(largest // 2), ramp(largest)][:channels], axis=-1)
    if channels == 4:
        values[..., 3] = 65535
    (tmp_path / "a.png").write_bytes(png(values))
    read = read_image(tmp_path / "a.png")
    assert np.abs(read - scaled(values[..., :3], bits)).max() <= 0.5
    assert f"use {bits} of 16 bits" in caplog.text


def test_bright_colour_is_as_before(tmp_path, caplog):
    values = np.stack([ramp(65535)] * 3, axis=-1)
    (tmp_path / "a.png").write_bytes(png(values))
    assert np.array_equal(read_image(tmp_path / "a.png"), values >> 8)
    assert not caplog.records


def test_dark_grey_with_transparency_is_refused(tmp_path):
    values = np.stack([ramp(4000), np.full((4, 64), 65535, np.uint16)], axis=-1)
    (tmp_path / "a.png").write_bytes(png(values))
    with pytest.raises(DataError, match=r"16 bits a channel but uses few"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("values", [np.ones((2, 2), np.float32), np.full((2, 2), -5, np.int32), np.full((2, 2), 10**6)])
def test_no_fixed_range(tmp_path, values):
    Image.fromarray(values.astype(np.float32 if values.dtype == np.float32 else np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"save it with 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


def test_notes_take_the_place_of_warnings(tmp_path, caplog):
    Image.fromarray(ramp(4000)).save(tmp_path / "a.png")
    notes = Notes()
    read_image(tmp_path / "a.png", notes=notes)
    assert notes.names == {"use 12 of 16 bits and were scaled by 4095": ["a.png"]} and not caplog.records


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_wide_pixels_are_turned(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    values = ramp(4000)
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(
        read_image(tmp_path / "a.png")[..., 0], np.rot90(scaled(values, 12), {3: 2, 6: -1, 8: 1}[orientation])
    )


@pytest.mark.parametrize("strip", [1, 64, 130, 10**6])
def test_strips_hold_every_pixel_once(tmp_path, monkeypatch, strip):
    monkeypatch.setattr(pixels, "STRIP", strip)
    values = np.random.default_rng(3).integers(0, 256, (7, 64, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), values)
