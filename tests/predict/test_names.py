"""Names of outputs: no two alike, none too long."""

from pathlib import Path

import pytest

from carsam.errors import CarsamError
from carsam.output.files import write_text
from carsam.predict.inputs import Photo
from carsam.predict.names import check_not_inputs, earlier_outputs, output_stems


def stems(*paths):
    return [str(stem) for stem in output_stems([Photo(Path(path)) for path in paths])]


def test_the_suffix_appears_where_it_is_needed():
    assert stems("a.png", "b.jpg") == ["a", "b"]
    assert stems("a.png", "a.jpg", "b.jpg") == ["a.png", "a.jpg", "b"]
    assert stems("A.png", "a.jpg") == ["A.png", "a.jpg"]  # one name on Windows and macOS
    assert stems("caf\u00e9.png", "cafe\u0301.jpg") == ["caf\u00e9.png", "cafe\u0301.jpg"]


@pytest.mark.parametrize(
    "paths",
    [
        ("x/a.png", "y/a.png"),
        ("x/a.png", "y/a.jpg", "z/a.png"),
        ("a.png", "a.jpg", "a.png.jpg"),
        ("a.png", "a.jpg", "a.png.jpg", "a.png.png"),
        ("x/A.png", "y/a.PNG"),
        *[("n" * 240 + "1.png", "n" * 240 + "2.png")],
    ],
)
def test_no_two_are_alike(paths):
    found = stems(*paths)
    assert len({stem.casefold() for stem in found}) == len(paths)


def test_subfolders_keep_names_apart():
    photos = [Photo(Path("p/x/a.png"), Path("x")), Photo(Path("p/y/a.png"), Path("y"))]
    assert output_stems(photos) == [Path("x/a"), Path("y/a")]


@pytest.mark.parametrize("name", ["n" * 241 + ".png", "\u5199" * 80 + ".png", "\u00e9" * 125 + ".jpg"])
def test_long_names_are_shortened(name, tmp_path):
    (stem,) = stems(name)
    output = tmp_path / f"{stem}_mask_12345_3.png"
    write_text(output, "")  # the file system takes it, and the temporary name beside it
    assert stem[:50] == name[:50] and stem == stems(name)[0]


def test_outputs_of_an_earlier_run(tmp_path):
    for name in ("a_mask_1.png", "a_mask_12_3.png", "a_overlay.png", "a.npz", "a.png_mask_1.png", "ab_mask_1.png"):
        (tmp_path / name).touch()
    (tmp_path / "a_mask_x.png").touch()

    def found(formats, *names):
        earlier = earlier_outputs(tmp_path, [Path(name) for name in names], formats)
        return {str(stem): [path.name for path in paths] for stem, paths in earlier.items()}

    assert found(["png"], "a") == {"a": ["a_mask_1.png", "a_mask_12_3.png"]}
    assert found(["npz", "overlay"], "a", "b") == {"a": ["a.npz", "a_overlay.png"]}
    assert found(["png"], "a.png", "b") == {"a.png": ["a.png_mask_1.png"]}
    assert found(["png", "npz", "overlay"], "c") == {}


def test_an_input_is_never_an_output(tmp_path):
    with pytest.raises(CarsamError, match="is an input"):
        check_not_inputs([tmp_path / "x" / ".." / "a_overlay.png"], [Photo(tmp_path / "a_overlay.png")])
