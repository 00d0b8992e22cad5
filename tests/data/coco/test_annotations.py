"""Every field of a COCO file, of the right and the wrong kind."""

import logging

import pytest

from carsam.data.coco.annotations import shown
from carsam.data.coco.checks import check_images
from carsam.data.coco.instances import CocoInstances
from carsam.errors import DataError


def set_in(index, **fields):
    def edit(content):
        content["annotations"][index].update(fields)

    return edit


def test_whole_floats_are_ids(content, write):
    for image in content["images"]:
        image["id"] = float(image["id"])
    for annotation in content["annotations"][:9]:
        annotation["image_id"] = float(annotation["image_id"])
        annotation["category_id"] = float(annotation["category_id"])
    instances = CocoInstances.from_file(write(content))
    first = instances.images[0].id
    assert first == 885 and type(first) is int
    assert sum(len(instances.instances(image.id)) for image in instances.images) == 25
    assert all(type(a.image_id) is int and type(a.category_id) is int for a in instances.annotations[885])


def test_ids_may_be_text(content, write):
    for entry in (*content["images"], *content["categories"]):
        entry["id"] = f"x{entry['id']}"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"x{annotation['image_id']}"
        annotation["category_id"] = f"x{annotation['category_id']}"
    instances = CocoInstances.from_file(write(content))
    assert instances.images[0].id == "x885" and len(instances.boxes("x885")) > 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_in(3, image_id="885"), r"annotation 3 \(id \d+\) .* '885', but the image has the id 885"),
        (set_in(3, image_id=True), "annotation 3 .* image_id True"),
        (set_in(3, image_id=None), "annotation 3 .* image_id None"),
        (set_in(3, image_id=885.5), "image_id 885.5"),
        (set_in(3, image_id=float("nan")), "image_id nan"),
        (set_in(3, image_id=10**40), "image_id 1000"),
        (set_in(3, image_id={"id": 1}), "image_id"),
        (set_in(3, image_id="\ud800"), "image_id"),
        (set_in(3, category_id="1"), "'1', but the category has the id 1"),
        (set_in(3, category_id=False), "category_id False"),
        (set_in(3, id=[1]), r"has the id \[1\]"),
        (set_in(3, bbox=None), "annotation 3 .* four finite numbers"),
        (set_in(3, bbox=[1, 2, float("inf"), 4]), "four finite numbers"),
        (set_in(3, bbox=[1, 2, float("nan"), 4]), "four finite numbers"),
        (set_in(3, bbox=[1, 2, 1e300, 4]), "four finite numbers"),
        (set_in(3, bbox=[1, 2, 10**400, 4]), "four finite numbers"),
        (set_in(3, bbox=[1, 2, True, 4]), "four finite numbers"),
        (set_in(3, bbox={"x": 1, "y": 2, "w": 3, "h": 4}), "four finite numbers"),
        (set_in(3, iscrowd="maybe"), "annotation 3 .* iscrowd 'maybe'"),
        (set_in(3, iscrowd=2), "iscrowd 2"),
        (set_in(3, iscrowd=[]), "iscrowd"),
        (lambda c: c["annotations"].insert(0, None), "annotation 0 .* None"),
        (lambda c: c["images"].insert(0, [1]), r"image 0 .* \[1\]"),
        (lambda c: c["images"][0].update(id="x"), "image ids of two types, such as 1268 .* and 'x'"),
        (lambda c: c["images"][0].update(id="1268"), "image ids of two types"),
        (lambda c: c["images"][0].update(id=True), "id True"),
        (lambda c: c["images"][1].update(id=885), "885 twice .*000000000885.jpg', '000000001268.jpg"),
        (lambda c: c["images"][0].update(file_name=7), "file_name 7"),
        (lambda c: c["images"][0].update(file_name=""), "file_name ''"),
        (lambda c: c["images"][0].update(file_name="a\0b"), "file_name"),
        (lambda c: c["images"][0].update(file_name="\udcff.jpg"), "file_name"),
        (lambda c: c["images"][0].update(width=-3), "width -3"),
        (lambda c: c["images"][0].update(width="wide"), "width 'wide'"),
        (lambda c: c["images"][0].update(width=51.5), "width 51.5"),
        (lambda c: c["images"][0].update(width=True), "width True"),
        (lambda c: c["images"][0].update(width=10**6, height=10**6), "megapixels"),
        (lambda c: c.update(images=None), "'images' .* must be a list"),
        (lambda c: c.update(annotations={"1": {}}), "'annotations' .* must be a list"),
        (lambda c: c.update(categories={"1": "cat"}), "'categories' .* must be a list"),
        (lambda c: c.update(categories=["cat"]), "category 0 .* 'cat'"),
        (lambda c: c["categories"].append({"id": 1, "name": "other"}), "'person', 'other'"),
        (lambda c: c["categories"].append({"id": "1", "name": "person"}), "category ids of two types"),
        (lambda c: c["categories"].append({"id": None, "name": "person"}), "id None"),
    ],
)
def test_refused(content, write, edit, message):
    edit(content)
    with pytest.raises(DataError, match=message):
        CocoInstances.from_file(write(content))


@pytest.mark.parametrize("value", [None, 0, 0.0, "0", False, "", "false", 1, 1.0, "1", True, "true"])
def test_iscrowd(content, write, value):
    content["annotations"][0]["iscrowd"] = value
    instances = CocoInstances.from_file(write(content))
    assert instances.annotations[885][0].iscrowd is (value in (1, "1", "true"))


@pytest.mark.parametrize("area", [-1, None, "many", 1e10, float("nan"), [], 10**400])
def test_the_area_is_the_masks_own(content, write, images, area):
    for annotation in content["annotations"]:
        annotation["area"] = area
    instances = CocoInstances.from_file(write(content))
    checked = check_images(instances, instances.images, images)
    assert checked.annotations[885][0].area == 3818
    with pytest.raises(ValueError, match="check_images"):
        _ = instances.annotations[885][0].area


@pytest.mark.parametrize("categories", [None, [], "missing", [{"id": 1}], [{"id": 1, "name": None}], [{"id": 1.0}] * 2])
def test_categories_that_are_not_needed(content, write, categories):
    content["categories"] = categories
    if categories == "missing":
        del content["categories"]
    for annotation in content["annotations"]:
        annotation["category_id"] = 1
    instances = CocoInstances.from_file(write(content))
    assert [(c.id, c.name) for c in instances.categories] == [(1, "1")]


def test_left_out_annotations_are_counted_once(content, write, caplog):
    for annotation in content["annotations"][:7]:
        annotation["image_id"] = 99
    content["annotations"][8]["id"] = content["annotations"][9]["id"]
    with caplog.at_level(logging.WARNING):
        instances = CocoInstances.from_file(write(content))
    assert sum(map(len, instances.annotations.values())) == 18
    assert len(caplog.records) == 2
    assert "7 of 25 annotations" in caplog.text and "1 annotation ids" in caplog.text


def test_ids_that_are_missing_are_positions(content, write):
    for annotation in content["annotations"]:
        del annotation["id"]
    instances = CocoInstances.from_file(write(content))
    assert [a.id for a in instances.annotations[885]][:3] == [0, 1, 2]


@pytest.mark.parametrize("value", [10**400, [1] * 99, dict.fromkeys(range(99)), "\udcff", "x" * 999, [[[]] * 3] * 5])
def test_values_in_messages_are_short_text(value):
    assert 0 < len(shown(value).encode()) <= 70
