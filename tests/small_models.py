"""A small random model of every family, for the tests that hold all families to the same contract."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tinyvit_state import SIDES, SMALL
from transformers import PreTrainedModel, Sam2Config, Sam2Model, Sam2VideoModel

from carsam.models.family import families
from carsam.models.sam.random import random_sam
from carsam.models.sam2.random import random_sam2
from carsam.models.tinyvit.random import random_tinyvit

# SAM 2's memory attention has layers that differ in nothing.
SMALL_MEMORY = {"memory_attention_num_layers": 1, "memory_attention_feed_forward_hidden_size": 64}

# A new family adds its own here.
SMALL_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "sam": lambda: random_sam("nano", 128, blocks=2),
    "sam2": lambda: random_sam2("nano", 128),
    "sam2_video": lambda: random_sam2("nano", 128, video=True, memory=SMALL_MEMORY),
    "tinyvit": lambda: random_tinyvit("mobilesam", SIDES["mobilesam"], **SMALL),
}


def small_model(name: str) -> PreTrainedModel:
    """The small model of a family; a package from outside has its own as ``small_model`` beside the family."""
    if name in SMALL_MODELS:
        return SMALL_MODELS[name]()
    return sys.modules[type(families()[name]).__module__].small_model()


def image_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model, called with an image and prompts: a model of videos as the image model with its weights."""
    if not isinstance(model, Sam2VideoModel):
        return model
    config = {key: getattr(model.config, key).to_dict() for key in ("prompt_encoder_config", "mask_decoder_config")}
    for part in config.values():
        part.pop("model_type")
    twin = Sam2Model(Sam2Config(vision_config=model.config.vision_config, **config))
    state = model.state_dict()
    twin.load_state_dict({name: state[name] for name in twin.state_dict()})
    return twin.eval()
