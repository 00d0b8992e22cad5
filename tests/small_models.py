"""A small random model of every family, for the tests that hold all families to the same contract."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tinyvit_state import SIDES, SMALL
from transformers import PreTrainedModel

from carsam.models.family import families
from carsam.models.sam.random import random_sam
from carsam.models.tinyvit.random import random_tinyvit

# A new family adds its own here.
SMALL_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "sam": lambda: random_sam("nano", 128, blocks=2),
    "tinyvit": lambda: random_tinyvit("mobilesam", SIDES["mobilesam"], **SMALL),
}


def small_model(name: str) -> PreTrainedModel:
    """The small model of a family; a package from outside has its own as ``small_model`` beside the family."""
    if name in SMALL_MODELS:
        return SMALL_MODELS[name]()
    return sys.modules[type(families()[name]).__module__].small_model()
