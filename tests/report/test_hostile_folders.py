"""A folder that somebody else made: its pictures, numbers and names harm neither the page nor the machine."""

import json
import shutil
import struct
import zlib

import pytest
from packed_example import save_diagnosis
from PIL import Image

from carsam.errors import CarsamError
from carsam.report.page import render
from carsam.report.pictures import Pictures
from carsam.report.source import read_source


@pytest.fixture
def folder(full_folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(full_folder, tmp_path / "packed")


def png(width, height, data=b""):
    """A PNG that claims a size, whatever its data are."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(60_000, 60_000), "claims more pixels"),
        (png(9_000, 9_000), "claims 9000 × 9000 pixels"),
        (png(2**31 - 1, 1), "claims more pixels"),
        (png(0, 0), "no PNG or JPEG"),
        (png(100, 100, bytes(50)), "truncated"),
        (png(8, 8)[:40], ""),
        (b"\xff\xd8\xff\xe0" + bytes(100), ""),
        (b"GIF89a" + bytes(50), "no PNG or JPEG"),
        (b"RIFF\x30\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0" + bytes(30), "no PNG or JPEG"),
        (b"", "no PNG or JPEG"),
        (bytes(9 * 2**20), "more than 8.4 MB"),
    ],
)
def test_a_picture_that_is_none(content, reason, folder, recwarn):
    """It is left out, with a note, before a pixel of it is decoded."""
    (folder / "diagnosis" / "heat" / "0-float.png").write_bytes(content)
    report = render(read_source(folder))
    assert list(report.refused) == ["heat/0-float.png"]
    assert reason in report.refused["heat/0-float.png"]
    assert report.html.count("<img") == 37
    assert "The picture is missing or damaged." in report.html
    assert "cannot be shown" in report.html
    assert not recwarn.list
    assert render(read_source(folder)).html == report.html


def test_a_jpeg_of_a_thousand_scans(tmp_path):
    path = tmp_path / "scans.jpg"
    Image.new("L", (64, 64)).save(path, progressive=True)
    data = path.read_bytes()
    begin = data.rindex(b"\xff\xda")
    path.write_bytes(data[:begin] + 1000 * data[begin:-2] + data[-2:])
    pictures = Pictures(tmp_path)
    assert pictures.get("scans.jpg") is None
    assert "scans" in pictures.refused["scans.jpg"]


@pytest.mark.parametrize(
    "name", ["../secret.png", "{root}/secret.png", "link.png", "circle.png", "a\0b.png", "x" * 5000]
)
def test_names_that_lead_elsewhere(name, folder):
    """Nothing outside the diagnosis is read, and a name that cannot be one is left out."""
    name = name.replace("{root}", str(folder))
    Image.new("RGB", (8, 8)).save(folder / "secret.png")
    (folder / "diagnosis" / "link.png").symlink_to("../secret.png")
    (folder / "diagnosis" / "circle.png").symlink_to("circle.png")
    diagnosis = json.loads((folder / "diagnosis" / "diagnosis.json").read_text())
    diagnosis["heat_maps"] = [{**diagnosis["heat_maps"][0], "float": name}]
    save_diagnosis(folder, diagnosis)
    report = render(read_source(folder))
    assert report.html.count("<img") == 19
    assert "The picture is missing or damaged." in report.html
    assert "\0" not in report.html


def test_numbers_beyond_a_float(folder):
    """1e999, −1e999, NaN and integers of thousands of digits, in every number of every file."""
    texts = {}
    for name in ("diagnosis/diagnosis.json", "results.json"):
        values = json.loads((folder / name).read_text(), parse_int=lambda _: "@", parse_float=lambda _: "@")
        texts[name] = json.dumps({**values, "format": 1})
    for number in ("1e999", "NaN", "9" * 400, "-" + "9" * 5000):
        for name, text in texts.items():
            (folder / name).write_text(text.replace('"@"', number))
        html = render(read_source(folder)).html
        assert html.rstrip().endswith("</html>")
        assert "9" * 300 not in html and " inf" not in html and " nan" not in html


def test_characters_that_no_text_may_hold(folder):
    diagnosis = json.loads((folder / "diagnosis" / "diagnosis.json").read_text())
    diagnosis["examples"][0]["image"] = "a\0b\ud800c\x1b[31m"
    save_diagnosis(folder, diagnosis)
    (folder / "recipe.yaml").write_text('model: "a\\0b\\e"\n')
    html = render(read_source(folder)).html
    html.encode()
    assert "\0" not in html and "\x1b" not in html
    assert "a\ufffdb\ufffdc\ufffd[31m" in html


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attentions": [{}] * 6_000}, "6000 entries under 'attentions'"),
        ({"attentions": [{"heads": [{}] * 4_000}] * 10}, "too many for a report"),
        ({"oscillation": {"stages": ["a"] * 201, "moments": [{}]}}, "201 entries under 'stages'"),
        ({"sites": [[[[{}] * 5_001]]]}, "5001 entries under 'sites'"),
        ({"examples": "deep"}, "nested too deeply"),
    ],
)
def test_more_than_any_diagnosis_holds(changes, words, folder):
    diagnosis = json.loads((folder / "diagnosis" / "diagnosis.json").read_text())
    text = json.dumps({**diagnosis, **changes})
    (folder / "diagnosis" / "diagnosis.json").write_text(text.replace('"deep"', "[" * 200 + "]" * 200))
    with pytest.raises(CarsamError, match=words) as caught:
        read_source(folder)
    assert "diagnosis.json" in str(caught.value)


def test_long_texts_are_cut(folder):
    diagnosis = json.loads((folder / "diagnosis" / "diagnosis.json").read_text())
    diagnosis["examples"][0]["image"] = "x" * 1_000_000
    save_diagnosis(folder, diagnosis)
    assert len(render(read_source(folder)).html) < 2_000_000


def test_a_recipe_whose_aliases_multiply(folder):
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
    (folder / "recipe.yaml").write_text(bomb + "overrides: {x: *i}\n")
    with pytest.raises(CarsamError, match=r"recipe\.yaml holds more than"):
        read_source(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [0, 2**62], "shape": [2**61]},
        {"data_offsets": [0, 8], "shape": [2**31, 2**31]},
        {"data_offsets": [8, 0], "shape": []},
        {"data_offsets": [0, 8], "shape": [-1, -1]},
        {"data_offsets": [0, 8], "shape": [1] * 100_000},
        {"data_offsets": [0.0, 8], "shape": [1]},
        {"data_offsets": [0, 8], "shape": [True]},
        {"data_offsets": 3, "shape": [1]},
        {"shape": [1]},
        [],
    ],
)
def test_tensors_that_the_file_cannot_hold(entry, folder):
    header = json.dumps({"a.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(CarsamError, match="truncated or altered"):
        read_source(folder)
