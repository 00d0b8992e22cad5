"""A float and a packed model with what one pass of both gives; read-only."""

from __future__ import annotations

import pytest

from carsam.diagnose.pair import Pair, open_pair
from carsam.diagnose.passes import Passes, run_passes
from carsam.prompts.diagnosis import diagnosis_images
from carsam.prompts.image import PromptedImage


@pytest.fixture(scope="session")
def pair(nano_folder, packed_folder) -> Pair:
    """The embedded model and its packed form."""
    return open_pair(nano_folder, packed_folder, "cpu")


@pytest.fixture(scope="session")
def samples(nano, evaluation_folder) -> tuple[PromptedImage, ...]:
    """Two evaluation images with two boxes each, and their masks."""
    images, coco = evaluation_folder / "images", evaluation_folder / "instances.json"
    return diagnosis_images(nano, images, coco=coco, limit=2, prompts=2)


@pytest.fixture(scope="session")
def passes(pair, samples) -> Passes:
    """Both models over the images."""
    return run_passes(pair, samples)
