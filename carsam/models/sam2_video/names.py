"""The modules of a SAM 2 with its memory by name, for people."""

from __future__ import annotations

from carsam.models.sam2.names import Sam2Names


class Sam2VideoNames(Sam2Names):
    """Names of ``Sam2VideoModel``: those of the image model, and the memory's."""

    family = "sam2_video"
    title = "SAM 2 with memory"
    model_types = ("sam2_video",)
    model_class = "Sam2VideoModel"
    processors = ("Sam2VideoProcessor", "Sam2ImageProcessor")
