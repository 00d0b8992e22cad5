"""Plain ONNX: what carsam's own runtime and own programs read."""

from __future__ import annotations

from typing import ClassVar

from carsam.export import segment_anything_2 as pyramid
from carsam.export.assemble import Around, assemble
from carsam.export.profile import Files, Profile, Subject
from carsam.export.segment_anything import EMBEDDINGS, decoder
from carsam.export.trace import Core


class Onnx(Profile):
    """Preprocessed pixels in, as the model itself wants them; prompts in batches, all masks out.

    The decoder is segment-anything's (``SamOnnxModel`` without ``return_single_mask``), with coordinates in the model's
    own frame and any number of prompts of one image.
    """

    name: ClassVar[str] = "onnx"
    tool: ClassVar[str] = "ONNX Runtime, OpenVINO and your own programs"

    def files(self, subject: Subject, core: Core) -> Files:
        if pyramid.is_pyramid(core):
            return {
                "encoder.onnx": pyramid.encoder(subject, core, "pixel_values"),
                "decoder.onnx": pyramid.decoder(subject, core, batch=True),
            }
        shape = (1, 3, core.side, core.side)
        around = Around({"pixel_values": shape}, {EMBEDDINGS: core.shapes[0]}, names={core.names[0]: EMBEDDINGS})
        return {
            "encoder.onnx": assemble(core.encoder, around, subject.properties("encoder", core)),
            "decoder.onnx": decoder(
                subject, core, frame=core.side, mask_side=core.low_res, single_mask=False, batch=True
            ),
        }
