"""SAM 2 with its memory: transformers' ``Sam2VideoModel``, which is what Meta's and the Hub's checkpoints hold.

On images it computes what :mod:`carsam.models.sam2` says, and is quantized as that model is. Memory attention, memory
encoder and object pointers are no sites yet: they stay in floating point.
"""

from __future__ import annotations

from transformers import PreTrainedModel, Sam2VideoModel

from carsam.models.sam2.family import Sam2
from carsam.models.sam2_video.names import Sam2VideoNames


class Sam2Video(Sam2):
    """transformers' ``Sam2VideoModel``."""

    name = "sam2_video"
    names = Sam2VideoNames()

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return Sam2VideoModel
