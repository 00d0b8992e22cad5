"""COCO files to spoil: three images of the evaluation set with their 25 objects."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def _three(evaluation_folder):
    data = json.loads((evaluation_folder / "instances.json").read_text())
    ids = [image["id"] for image in data["images"][:3]]
    return {
        "images": data["images"][:3],
        "annotations": [a for a in data["annotations"] if a["image_id"] in ids],
        "categories": data["categories"],
    }


@pytest.fixture
def content(_three):
    """A valid file's content, to be changed."""
    return copy.deepcopy(_three)


@pytest.fixture
def images(evaluation_folder) -> Path:
    """Folder of its images."""
    return evaluation_folder / "images"


@pytest.fixture
def write(tmp_path):
    """Writes content (or text, or bytes) to a file."""

    def _write(value, name="instances.json"):
        path = tmp_path / name
        if not isinstance(value, bytes):
            value = (value if isinstance(value, str) else json.dumps(value)).encode()
        path.write_bytes(value)
        return path

    return _write
