"""Names that are spelled in another way than the files."""

import unicodedata

import pytest
from PIL import Image

from carsam.data.coco.annotations import CocoImage
from carsam.data.images.folder import ImageFolder, locate
from carsam.errors import DataError

ACCENT = "café.png"


@pytest.fixture
def folder(tmp_path):
    for name in ("a.JPG", "sub/b.png", "train/1.png", "val/1.png", "c d.png", unicodedata.normalize("NFC", ACCENT)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    return tmp_path


def find(folder, *names):
    images = [CocoImage(i, name, 6, 8) for i, name in enumerate(names)]
    found, respelled = locate(images, ImageFolder(folder), folder / "c.json")
    return [found[i].relative_to(folder).as_posix() for i in range(len(names))], [i.file_name for i in respelled]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a.jpg", "a.JPG"),
        ("A.Jpg", "a.JPG"),
        ("sub\\b.png", "sub/b.png"),
        ("C:\\Users\\me\\sub\\b.png", "sub/b.png"),
        ("D:/data/b.png", "sub/b.png"),
        ("/home/me/b.png", "sub/b.png"),
        ("./b.png", "sub/b.png"),
        ("../images/a.JPG", "a.JPG"),
        ("b.png", "sub/b.png"),
        ("val2017/a.JPG", "a.JPG"),
        ("elsewhere\\val\\1.png", "val/1.png"),
        ("c%20d.png", "c d.png"),
        ("http://images.example.org/x/c%20d.png", "c d.png"),
        (unicodedata.normalize("NFD", ACCENT), unicodedata.normalize("NFC", ACCENT)),
    ],
)
def test_other_spellings(folder, name, path):
    assert find(folder, name) == ([path], [name])


def test_exact_names_win(folder):
    assert find(folder, "a.JPG", "train/1.png", "val/1.png") == (["a.JPG", "train/1.png", "val/1.png"], [])
    Image.new("RGB", (8, 6)).save(folder / "a.jpg")
    assert find(folder, "a.JPG", "a.jpg") == (["a.JPG", "a.jpg"], [])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.png"], r"1 of the 1 images .* are not in .*several files fit: train/1.png, val/1.png"),
        (["sub/a.png"], "there is a.JPG, with another suffix"),
        (["none.png", "a.JPG"], r"1 of the 2 images .* \(first: none.png\); give the folder"),
        # Both lead to one file, which cannot be both.
        (["x/a.jpg", "y/a.jpg"], "2 of the 2 images"),
        (["a.JPG", "y/a.jpg"], "1 of the 2 images"),
        (["x" * 300], "1 of the 1 images"),
        ([".."], "1 of the 1 images"),
        (["sub"], "1 of the 1 images"),
    ],
)
def test_not_found(folder, names, message):
    with pytest.raises(DataError, match=message):
        find(folder, *names)


def test_no_folder(folder):
    with pytest.raises(DataError, match=r"no image folder"):
        ImageFolder(folder / "none")
    with pytest.raises(DataError, match=r"is a file; give the folder"):
        ImageFolder(folder / "a.JPG")
