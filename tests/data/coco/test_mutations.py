"""Files spoiled at random: read and checked, or refused with a message; nothing else."""

import copy
import json
import random

import pytest

from carsam.data.coco.checks import check_detections, check_images
from carsam.data.coco.detections import load_detections
from carsam.data.coco.instances import CocoInstances
from carsam.errors import DataError

VALUES = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 885, 10**6, 2**31, 2**32, 2**63, 2**64, 10**30, 10**400, 1e308),
    *(float("nan"), float("inf"), -float("inf"), "", "0", "1", "885", "nan", "text", "ü", "\0", "\ud800", "../..", "/"),
    *([], {}, [[]], [{}], [None], [1], [1, 2, 3], [1, 2, 3, 4], [[1, 2], [3, 4], [5, 6]], {"x": 1, "y": 2}),
    *(
        {"size": [1, 1], "counts": [1]},
        {"size": [342, 512], "counts": "0"},
        {"counts": "oooo"},
        [[9, 9, 2e8, 9, 9, 99]],
    ),
)


def places(value, path=()):
    """Paths of all values in a JSON tree; of long lists only the first items."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:6]) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def mutate(value, rng):
    """A copy with one to three places replaced, deleted or doubled."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice([p for p in places(value) if p])
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        action = rng.random()
        if action < 0.15:
            del parent[path[-1]]
        elif action < 0.25 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    return value


def survives(call):
    """Whether a call returns; a refusal must be a message for people."""
    try:
        call()
    except DataError as error:
        assert 10 < len(str(error).encode()) < 2000 and "Traceback" not in str(error)
        return False
    return True


@pytest.mark.parametrize("seed", range(80))
def test_coco_files(content, write, images, seed):
    content["annotations"] = content["annotations"][:8]
    content["annotations"][1]["segmentation"] = [[231, 0, 266, 0, 266, 10, 231, 10]]
    content["annotations"][2]["segmentation"] = {"size": [342, 512], "counts": [100, 342 * 512 - 100]}
    content["categories"] = content["categories"][:2]
    path = write(json.dumps(mutate(content, random.Random(seed))))

    def read():
        instances = CocoInstances.from_file(path)
        checked = check_images(instances, instances.images, images)
        for image in checked.images:
            assert len(checked.masks(image.id)) == len(checked.boxes(image.id)) == len(checked.instances(image.id))
            assert all(a.area >= 0 for a in checked.annotations[image.id])

    survives(read)


def test_an_unspoiled_file_is_read(content, write, images):
    instances = CocoInstances.from_file(write(content))
    assert survives(lambda: check_images(instances, instances.images, images))


@pytest.mark.parametrize("seed", range(40))
def test_detections(content, write, images, seed):
    instances = CocoInstances.from_file(write(content))
    checked = check_images(instances, instances.images, images)
    entries = [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.5} for a in content["annotations"]]
    path = write(json.dumps(mutate(entries, random.Random(seed))), "detections.json")
    survives(lambda: check_detections(load_detections(path), checked, path))


@pytest.mark.parametrize("seed", range(30))
def test_bytes(content, write, seed):
    rng = random.Random(seed)
    data = bytearray(json.dumps(content).encode())
    for _ in range(rng.randint(1, 20)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path = write(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]))
    survives(lambda: CocoInstances.from_file(path))
