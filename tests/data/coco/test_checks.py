"""What is found before the first prediction."""

import json
import logging
import shutil

import numpy as np
import pytest
from PIL import Image

from carsam.data.coco import checks
from carsam.data.coco.checks import check_detections, check_images
from carsam.data.coco.detections import Detection
from carsam.data.coco.instances import CocoInstances
from carsam.errors import DataError


@pytest.fixture
def check(content, write, images):
    def _check(edit=lambda content: None, folder=images):
        edit(content)
        instances = CocoInstances.from_file(write(content))
        return check_images(instances, instances.images, folder)

    return _check


def count(instances):
    return sum(len(instances.instances(image.id)) for image in instances.images)


def test_valid_data_passes_in_silence(check, images, caplog):
    checked = check()
    assert not caplog.records
    assert count(checked) == 25
    assert [image.size for image in checked.images] == [(342, 512), (342, 512), (384, 512)]
    assert checked.images[0].path == images / "000000000885.jpg"
    first = checked.annotations[885][0]
    assert first.area == 3818 and first.segmentation is None
    assert checked.read_image(checked.images[0], images).shape == (342, 512, 3)


def test_only_the_images_of_the_run_are_looked_at(content, write, images):
    content["images"][2]["file_name"] = "gone.jpg"
    content["annotations"][-1]["segmentation"] = "text"
    instances = CocoInstances.from_file(write(content))
    assert len(check_images(instances, instances.images[:2], images).images) == 2
    with pytest.raises(DataError, match=r"1 of the 3 images .* gone.jpg"):
        check_images(instances, instances.images, images)


@pytest.mark.parametrize("sizes", [(None, None), (342.0, 512.0), ("342", "512"), (342, None), (None, 512.0)])
def test_height_and_width(check, sizes):
    def edit(content):
        content["images"][0].update(height=sizes[0], width=sizes[1])
        del content["images"][1]["height"], content["images"][1]["width"]

    assert [image.size for image in check(edit).images] == [(342, 512), (342, 512), (384, 512)]


def test_another_size(check):
    with pytest.raises(DataError, match=r"000000000885.jpg is 342 × 512 .* says 341 × 512"):
        check(lambda c: c["images"][0].update(height=341))


@pytest.mark.parametrize("empty", [None, [], "absent", [[]], {"size": [342, 512], "counts": []}, [[1, 2, 3, 4]]])
def test_objects_without_a_mask_are_left_out(check, empty, caplog):
    def edit(content):
        for annotation in content["annotations"][:2]:
            annotation["segmentation"] = empty
        if empty == "absent":
            del content["annotations"][0]["segmentation"], content["annotations"][1]["segmentation"]
        content["annotations"].append({**content["annotations"][0], "id": 999, "iscrowd": 1})

    assert count(check(edit)) == 23
    assert next(r.getMessage() for r in caplog.records).startswith(
        "left out, because they have no mask: 2 of 25 objects and 1 groups (iscrowd)"
    )
    assert len(caplog.records) == 1


def test_no_object_has_a_mask(check):
    def edit(content):
        for annotation in content["annotations"]:
            annotation["segmentation"] = []

    with pytest.raises(DataError, match=r"none of the 25 objects .* has a mask"):
        check(edit)


@pytest.mark.parametrize("value", [float("nan"), None, float("inf"), 2e8])
def test_a_spoiled_polygon_is_named(check, value):
    with pytest.raises(DataError, match=r"annotation 56 of image '000000000885.jpg' .* no coordinate"):
        check(lambda c: c["annotations"][0].update(segmentation=[[value, 21, 511, 21, 511, 203]]))


def test_boxes_of_another_form(check):
    def edit(content):
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["bbox"] = [x, y, x + w, y + h]

    with pytest.raises(DataError, match=r"2\d of 25 boxes .* contradict the mask .* look like x1, y1, x2, y2"):
        check(edit)


@pytest.mark.parametrize("decoded", [200, 0])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_cut_off_last_image_is_found_first(check, images, tmp_path, monkeypatch, decoded, suffix):
    monkeypatch.setattr(checks, "MAX_DECODED", decoded)
    folder = tmp_path / "images"
    folder.mkdir()

    def edit(content):
        for image in content["images"]:
            name = image["file_name"].replace(".jpg", suffix)
            with Image.open(images / image["file_name"]) as picture:
                # A whole thumbnail inside, as cameras write it, hides the cut.
                picture.save(folder / name, exif=picture.getexif(), comment=b"\xff\xd8 thumbnail \xff\xd9")
            image["file_name"] = name
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) * 2 // 3])

    with pytest.raises(DataError, match=rf"cannot read the image .*000000002153{suffix}"):
        check(edit, folder)


def test_all_bad_images_are_reported_together(check, images, tmp_path):
    for path in images.iterdir():
        (tmp_path / path.name).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"3 images of .* cannot be used; the first: cannot read the image .*885.jpg"):
        check(folder=tmp_path)


def exif_image(folder, orientation, size=(40, 30)):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.arange(size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "a.png", exif=exif)
    return pixels


def one_image(folder, box, height=None, width=None, segmentation="polygon"):
    x, y, w, h = box
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box}
    annotation["segmentation"] = polygon if segmentation == "polygon" else segmentation
    image = {"id": 1, "file_name": "a.png", "height": height, "width": width}
    (folder / "c.json").write_text(json.dumps({"images": [image], "annotations": [annotation]}))
    instances = CocoInstances.from_file(folder / "c.json")
    return check_images(instances, instances.images, folder)


@pytest.mark.parametrize(("orientation", "size"), [(2, (40, 30)), (3, (40, 30)), (4, (40, 30)), (6, (30, 30))])
def test_an_orientation_that_keeps_the_size(tmp_path, caplog, orientation, size):
    exif_image(tmp_path, orientation, size)
    checked = one_image(tmp_path, [2, 3, 10, 12], size[1], size[0])
    assert "1 of 1 images have an EXIF orientation that leaves the size" in caplog.text and "upright" in caplog.text
    assert checked.images[0].upright
    caplog.clear()
    exif_image(tmp_path, 1, size)
    one_image(tmp_path, [2, 3, 10, 12], size[1], size[0])
    assert not caplog.records


# The image is stored 40 × 30 (width × height) and shown 30 × 40. A tall box fits upright only, a wide one as stored.
TALL, WIDE, SMALL = [2, 3, 10, 35], [2, 3, 35, 10], [2, 3, 9, 9]


@pytest.mark.parametrize(
    ("noted", "box", "size", "swapped"),
    [
        ((40, 30), SMALL, (40, 30), False),
        ((30, 40), SMALL, (30, 40), False),
        ((30, 40), WIDE, (30, 40), False),
        ((30, 40), TALL, (40, 30), True),
        ((40, 30), WIDE, (30, 40), True),
        ((None, None), SMALL, (40, 30), False),
    ],
)
def test_boxes_beyond_the_noted_size_tell_the_orientation(tmp_path, caplog, noted, box, size, swapped):
    stored = exif_image(tmp_path, 6)
    checked = one_image(tmp_path, box, *noted)
    (image,) = checked.images
    assert image.size == size
    assert ("width and height swapped" in caplog.text) is swapped
    pixels = checked.read_image(image, tmp_path)
    assert np.array_equal(pixels, stored if size == (30, 40) else np.rot90(stored, -1))


def test_rle_sizes_tell_the_orientation(tmp_path, caplog):
    exif_image(tmp_path, 6)
    masks = {"size": [30, 40], "counts": [100, 500, 600]}
    assert one_image(tmp_path, SMALL, segmentation=masks).images[0].size == (30, 40)
    assert one_image(tmp_path, SMALL, 40, 30, segmentation=masks).images[0].size == (30, 40)
    assert "swapped" in caplog.text


def test_swapped_sides_without_orientation(tmp_path, caplog):
    exif_image(tmp_path, 1)
    assert one_image(tmp_path, WIDE, 40, 30).images[0].size == (30, 40)
    assert "swapped" in caplog.text
    with pytest.raises(DataError, match=r"30 × 40 .* says 40 × 30"):
        one_image(tmp_path, SMALL, 40, 30)


def test_sixteen_bits_are_said_once(check, images, tmp_path, caplog):
    def edit(content):
        for image in content["images"]:
            with Image.open(images / image["file_name"]) as picture:
                values = np.asarray(picture.convert("L")).astype(np.uint16) * 16
            image["file_name"] = image["file_name"].replace("jpg", "png")
            Image.fromarray(values).save(tmp_path / image["file_name"])

    checked = check(edit, tmp_path)
    for image in checked.images:
        assert checked.read_image(image, tmp_path).mean() > 40
    assert len(caplog.records) == 1 and "3 of 3 images hold 16 bits a channel" in caplog.text


@pytest.fixture
def checked(check):
    return check()


def detection(**changes):
    return Detection(**{"image_id": 885, "category_id": 1, "bbox": (9.0, 9, 50, 50), "score": 0.5, **changes})


@pytest.mark.parametrize(
    ("detections", "message"),
    [
        ([detection(), detection(image_id="885")], "detection 1 in d.json has the image_id '885', .* has 885"),
        ([detection(), detection(category_id="1")], "detection 1 .* category_id '1'"),
        ([detection(bbox=(0.1, 0.2, 0.3, 0.4))] * 5, "shares of the image"),
        ([detection(bbox=(300, 200, 500, 330))] * 5, "look like x1, y1, x2, y2"),
    ],
)
def test_detections_that_cannot_match(checked, detections, message):
    with pytest.raises(DataError, match=message):
        check_detections(detections, checked, "d.json")


def test_detections_that_match(checked, caplog):
    with caplog.at_level(logging.WARNING):
        check_detections([detection(), detection(image_id=1268), detection(image_id=5)], checked, "d.json")
    assert not caplog.records


def test_images_may_lie_elsewhere_in_the_folder(check, images, tmp_path, caplog):
    (tmp_path / "deep").mkdir()
    for path in images.iterdir():
        shutil.copy(path, tmp_path / "deep" / path.name)

    def edit(content):
        for image in content["images"]:
            image["file_name"] = "C:\\Users\\me\\" + image["file_name"]

    assert check(edit, tmp_path).images[0].path == tmp_path / "deep" / "000000000885.jpg"
    assert len(caplog.records) == 1 and "3 of 3 images were found under another spelling" in caplog.text
