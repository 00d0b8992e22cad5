"""A small random model of every family, for the tests that hold all families to the same contract."""

from __future__ import annotations

from collections.abc import Callable

from tinyvit_state import SIDES, SMALL
from transformers import PreTrainedModel

from carsam.models.sam.random import random_sam
from carsam.models.tinyvit.random import random_tinyvit

# A new family adds its own here.
SMALL_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "sam": lambda: random_sam("nano", 128, blocks=2),
    "tinyvit": lambda: random_tinyvit("mobilesam", SIDES["mobilesam"], **SMALL),
}
