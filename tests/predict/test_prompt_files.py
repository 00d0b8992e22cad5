"""Prompts from flags and files, checked against their images."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from carsam.errors import DataError
from carsam.predict.inputs import Photo, measure
from carsam.predict.prompts import Prompt, check, from_flags, read_prompts

PHOTO = Photo(Path("a.jpg"), size=(300, 400))


def write(path, *entries):
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
    return path


def test_flags():
    assert from_flags(["1,2,3,4", "5,6,7.5,8"], []) == [Prompt((1, 2, 3, 4)), Prompt((5, 6, 7.5, 8))]
    assert from_flags([], ["1,2", "3,4,0"]) == [Prompt(None, ((1, 2, 1), (3, 4, 0)))]
    assert from_flags(["1,2,3,4"], ["1,2"]) == [Prompt((1, 2, 3, 4), ((1, 2, 1),))]
    assert from_flags([], []) == []


def test_boxes_are_clipped():
    assert check([Prompt((-5, 10, 1000, 200))], PHOTO) == [Prompt((0, 10, 400, 200))]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt((0.1, 0.2, 0.4, 0.6)), "on 0..1, but prompts are in pixels: of a.jpg.* that is 40,60,160,180"),
        (Prompt((0, 0, 1, 1)), "that is 0,0,400,300"),
        (Prompt(points=((0.5, 0.25, 1),)), "on 0..1, but prompts are in pixels.* that is 200,75"),
        (Prompt((10, 20, 5, 30)), "no area inside the image"),
        (Prompt((500, 20, 600, 30)), r"no area inside the image a.jpg, which is 400 × 300 pixels"),
        (Prompt(points=((401, 3, 1),)), "outside the image"),
        (Prompt(points=((float("nan"), 3, 1),)), "outside the image"),
    ],
)
def test_what_does_not_fit(prompt, message):
    with pytest.raises(DataError, match=message):
        check([prompt], PHOTO)


def test_pixels_near_the_corner_are_pixels():
    prompts = [Prompt((0, 0, 2, 2)), Prompt(points=((0, 1, 1),)), Prompt(points=((1.5, 0.5, 1),))]
    assert check(prompts, PHOTO) == prompts
    tiny = replace(PHOTO, size=(1, 1))
    assert check([Prompt((0, 0, 1, 1))], tiny) == [Prompt((0, 0, 1, 1))]


def test_json_lines(tmp_path):
    path = write(
        tmp_path / "prompts.jsonl",
        {"image": "a.jpg", "boxes": [[1, 2, 30, 40], [5, 6, 70, 80]]},
        "",
        {"image": "a.jpg", "points": [[1, 2], [3, 4]], "labels": [1, 0]},
        {"image": "b.jpg", "points": [[[1, 2], [3, 4]], [[5, 6]]]},
        {"image": "c.jpg", "boxes": [[1, 2, 30, 40]], "points": [[1, 2]]},
        {"image": "d.jpg", "boxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "points": [[[1, 2]], [[5, 6]]], "labels": [[1], [0]]},
    )
    assert read_prompts(path).by_name == {
        "a.jpg": [Prompt((1, 2, 30, 40)), Prompt((5, 6, 70, 80)), Prompt(None, ((1, 2, 1), (3, 4, 0)))],
        "b.jpg": [Prompt(None, ((1, 2, 1), (3, 4, 1))), Prompt(None, ((5, 6, 1),))],
        "c.jpg": [Prompt((1, 2, 30, 40), ((1, 2, 1),))],
        "d.jpg": [Prompt((1, 2, 3, 4), ((1, 2, 1),)), Prompt((5, 6, 7, 8), ((5, 6, 0),))],
    }


def test_one_line_a_list_and_odd_encodings(tmp_path):
    entry = {"image": "a.jpg", "boxes": [[1, 2, 30, 40]]}
    expected = {"a.jpg": [Prompt((1, 2, 30, 40))]}
    path = tmp_path / "prompts.json"
    for text in (json.dumps(entry), json.dumps([entry], indent=1)):
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            path.write_text(text, encoding=encoding)
            assert read_prompts(path).by_name == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of .* is not valid JSON"),
        ("[" * 100_000, "line 2 of .* is not valid JSON"),
        ([1], 'line 2 of .* has no "image"'),
        ({"boxes": [[1, 2, 3, 4]]}, 'has no "image"'),
        ({"image": 5, "boxes": [[1, 2, 3, 4]]}, 'has no "image"'),
        ({"image": "a"}, 'no "boxes" and no "points"'),
        ({"image": "a", "boxes": []}, 'no "boxes" and no "points"'),
        ({"image": "a", "boxes": [1, 2, 3, 4]}, '"boxes" in line 2'),
        ({"image": "a", "boxes": [[1, 2, 3]]}, '"boxes" in line 2'),
        ({"image": "a", "boxes": [[1, 2, 3, None]]}, '"boxes" in line 2'),
        ({"image": "a", "boxes": [[1, 2, 3, 1e30]]}, '"boxes" in line 2'),
        ('{"image": "a", "boxes": [[1, 2, NaN, 4]]}', '"boxes" in line 2'),
        ({"image": "a", "boxes": {"x": 1}}, '"boxes" in line 2'),
        ({"image": "a", "points": [[1, 2, 3]]}, '"points" in line 2'),
        ({"image": "a", "points": 5}, '"points" in line 2'),
        ({"image": "a", "points": [[1, 2], [[1, 2]]]}, '"points" in line 2'),
        ({"image": "a", "points": [[[1, 2]], [1, 2]]}, '"points" in line 2'),
        ({"image": "a", "points": [[1, 2]], "labels": [2]}, '"labels" in line 2'),
        ({"image": "a", "points": [[1, 2]], "labels": [1, 0]}, '"labels" in line 2'),
        ({"image": "a", "points": [[1, 2]], "labels": 1}, '"labels" in line 2'),
        ({"image": "a", "points": [[[1, 2]]], "labels": [1]}, '"labels" in line 2'),
        ({"image": "a", "boxes": [[1, 2, 3, 4]] * 2, "points": [[1, 2]]}, "points belong to one object"),
    ],
)
def test_wrong_lines(line, message, tmp_path):
    path = write(tmp_path / "prompts.jsonl", {"image": "z", "boxes": [[1, 2, 3, 4]]}, line)
    with pytest.raises(DataError, match=message):
        read_prompts(path)


def test_coco(evaluation_folder):
    file = read_prompts(evaluation_folder / "instances.json")
    content = json.loads((evaluation_folder / "instances.json").read_text())
    image = content["images"][0]
    objects = [a for a in content["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
    found = file.by_name[image["file_name"]]
    assert [prompt.annotation for prompt in found] == [a["id"] for a in objects]
    x, y, width, height = objects[0]["bbox"]
    assert found[0].box == pytest.approx((x, y, x + width, y + height))
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert found[0].category == (objects[0]["category_id"], names[objects[0]["category_id"]])
    (photo,), _ = measure([Photo(evaluation_folder / "images" / image["file_name"])])
    assigned = file.assign([photo])
    assert assigned.image_ids == {photo.path: image["id"]} and assigned.absent == len(content["images"]) - 1
    assert assigned.work[0][0].size == (image["height"], image["width"])


def test_no_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is empty"):
        read_prompts(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(DataError, match=r"line 1 of .* is not valid JSON"):
        read_prompts(write(tmp_path / "deep.jsonl", "[" * 100_000))
    (tmp_path / "picture.jsonl").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(DataError, match="picture"):
        read_prompts(tmp_path / "picture.jsonl")


def assign(tmp_path, names, *photos):
    path = write(tmp_path / "p.jsonl", *({"image": name, "boxes": [[1, 2, 30, 40]]} for name in names))
    return read_prompts(path).assign([replace(PHOTO, path=Path(photo)) for photo in photos])


def test_names_meet_images(tmp_path):
    found = assign(tmp_path, ["b.jpg", "x/a.jpg", "gone.jpg"], "x/a.jpg", "in/b.jpg", "in/c.jpg")
    assert [str(photo.path) for photo, _ in found.work] == ["x/a.jpg", "in/b.jpg"]
    assert (found.without, found.absent) == (1, 1)
    # As Label Studio writes it on Windows; and with the folder that tells two of one name apart.
    assert len(assign(tmp_path, ["photos\\b.jpg"], "in/b.jpg").work) == 1
    assert str(assign(tmp_path, ["y/a.jpg"], "x/a.jpg", "y/a.jpg").work[0][0].path) == "y/a.jpg"


def test_names_that_meet_nothing_or_too_much(tmp_path):
    with pytest.raises(DataError, match=r"it names 'gone.jpg', the first image is 'a.jpg'"):
        assign(tmp_path, ["gone.jpg"], "a.jpg")
    with pytest.raises(DataError, match=r"'a.jpg' in .* could be x.a.jpg and y.a.jpg"):
        assign(tmp_path, ["a.jpg"], "x/a.jpg", "y/a.jpg")
    with pytest.raises(DataError, match="twice"):
        assign(tmp_path, ["a.jpg", "./a.jpg"], "x/a.jpg")
    with pytest.raises(DataError, match=r"no area.*|outside"):
        path = write(tmp_path / "p.jsonl", {"image": "a.jpg", "boxes": [[900, 900, 950, 950]]})
        read_prompts(path).assign([PHOTO])
