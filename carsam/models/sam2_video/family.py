"""SAM 2 with its memory: transformers' ``Sam2VideoModel``, which is what Meta's and the Hub's checkpoints hold.

On images it computes what :mod:`carsam.models.sam2` says, and is quantized as that model is. Its memory joins in as two
more parts between encoder and decoder (:mod:`carsam.models.sam2_video.memory`). A part's inputs are found by following
objects through clips with the model as far as it is quantized: the memory bank of the calibration holds the errors that
the bank of a real video holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Sam2VideoModel

from carsam.models.family import DECODER, ENCODED, ENCODER, Part, Tensors
from carsam.models.rotation import Rotation
from carsam.models.sam import decoder
from carsam.models.sam2.family import Sam2
from carsam.models.sam2_video import memory
from carsam.models.sam2_video.clips import OBJECTS, calls_of, follow, moving_still
from carsam.models.sam2_video.names import Sam2VideoNames
from carsam.models.sam2_video.tracking import Sam2Tracker
from carsam.models.sites import Sites
from carsam.models.tracking import Frames, Tracker
from carsam.reconstruct.units import Unit

if TYPE_CHECKING:
    from carsam.prompts.calibration import CalibrationImage, CalibrationSet

# Frames of a clip that calibrate the decoder.
_DECODED = 8


class Sam2Video(Sam2):
    """transformers' ``Sam2VideoModel``."""

    name = "sam2_video"
    names = Sam2VideoNames()

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return Sam2VideoModel

    def sites(self, model: nn.Module) -> Sites:
        found = super().sites(model)
        inside = [site.name for site in found.layers if found.in_decoder(site.name)]
        first = next(index for index, site in enumerate(found.layers) if site.name == inside[0])
        own = memory.attentions(model)
        place = next(index for index, site in enumerate(found.attentions) if found.in_decoder(site.name))
        return replace(
            found,
            layers=(*found.layers[:first], *memory.linear_layers(model), *found.layers[first:]),
            attentions=(*found.attentions[:place], *own, *found.attentions[place:]),
            readers=(*found.readers, *memory.readers(model)),
            floating=(*found.floating, *memory.floating(model)),
            memory_stages=memory.stage_paths(model),
        )

    def parts(self, sites: Sites, granularity: str = "module") -> tuple[Part, ...]:
        encoder, last = super().parts(sites, granularity)
        entered = partial(self._enter_decoder, last.enter, granularity)
        return (encoder, *memory.parts(sites.memory_stages, self.follow), replace(last, enter=entered))

    def decode(self, model: nn.Module, encoded: Tensors, image: CalibrationImage) -> None:
        """None: what the decoder reads has been through a clip's memory by then, and no gradient passes that."""
        return None

    def units(self, sites: Sites, part: str, granularity: str = "module") -> list[Unit]:
        if part in (ENCODER, DECODER):
            return super().units(sites, part, granularity)
        return memory.units(sites.memory_stages, part)

    def calibration_data(self, model: nn.Module, data: CalibrationSet) -> CalibrationSet:
        from carsam.prompts.clips import as_clips  # reads images, whose room asks for families

        return as_clips(data, moving_still)

    def follow(self, model: nn.Module, image: CalibrationImage, objects: int = OBJECTS) -> None:
        """Follows the largest objects of a clip; a still image moves for it."""
        frames = getattr(image, "frames", None)
        if frames is None:
            frames = moving_still(image.pixel_values, 0, model.config.num_maskmem + 1)
        else:
            frames = frames[: min(image.age, model.config.num_maskmem) + 1]  # what comes later calibrates nothing
        follow(model, frames, image.boxes, getattr(image, "masks", None), objects)

    def forward(self, model: nn.Module, image: CalibrationImage) -> None:
        with torch.no_grad():
            age = getattr(image, "age", None)
            if age is None:
                self.follow(model, image)
            # Observers keep something of every pass, and a clip has many: half of the clips, one object each, will do.
            elif age >= model.config.num_maskmem:
                self.follow(model, image, objects=1)
        super().forward(model, image)

    def rotations(self, call: Mapping[str, Any]) -> tuple[Rotation, Rotation]:
        return memory.rotations(call)

    def track(self, model: nn.Module, frames: Frames) -> Tracker:
        return Sam2Tracker(model, frames)

    def _enter_decoder(
        self, with_boxes, granularity: str, model: nn.Module, before: Tensors, image: CalibrationImage
    ) -> Tensors:
        """Inputs of the decoder: of frames whose objects come from memory, or of the image with its boxes."""
        if not getattr(image, "tracked", False):
            if ENCODED not in before:
                before = {ENCODED: self.encode_image(model, image.pixel_values)}
            return with_boxes(model, before, image)
        transformer = model.get_submodule(decoder.TRANSFORMER)
        calls = [kwargs for _, kwargs in calls_of([transformer], lambda: self.follow(model, image))[0]]
        # A prompt on the first frame has other tokens than the frames after it, which have none.
        tokens = calls[-1]["point_embeddings"].shape
        calls = [call for call in calls if call["point_embeddings"].shape == tokens]
        chosen = calls[:: max(1, len(calls) // _DECODED)][-_DECODED:]
        names = [name for name, value in calls[-1].items() if isinstance(value, Tensor)]
        arguments = {name: torch.cat([call[name] for call in chosen]) for name in names}
        if granularity == "decoder":
            return arguments
        return decoder.first_block_inputs(model, self._first_block(model), arguments)

    def _first_block(self, model: nn.Module) -> str:
        return decoder.two_way_blocks(model, self.block)[0].name
