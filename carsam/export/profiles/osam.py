"""osam (PyPI, MIT), the models of labelme: a pair that its class ``Sam`` runs."""

from __future__ import annotations

from typing import ClassVar

from onnx import TensorProto

from carsam.export import segment_anything_2 as pyramid
from carsam.export.profile import MASK, Files, Profile, Subject
from carsam.export.segment_anything import decoder, normalised_encoder
from carsam.export.trace import Core

# What its class ``Sam2`` calls the maps, in its order.
MAPS = {
    "image_embed": "image_embeddings",
    "high_res_feats_0": "high_res_features1",
    "high_res_feats_1": "high_res_features2",
}


class Osam(Profile):
    """The input is called ``x`` and normalised by the tool, which reads the frame's side from its shape."""

    name: ClassVar[str] = "osam"
    tool: ClassVar[str] = "osam and labelme"

    def files(self, subject: Subject, core: Core) -> Files:
        if pyramid.is_pyramid(core):
            return {
                f"{subject.name}.encoder.onnx": pyramid.encoder(subject, core, "input", MAPS),
                f"{subject.name}.decoder.onnx": pyramid.decoder(
                    subject, core, MAPS, mask_side=MASK, pad=True, first=1, size_type=TensorProto.INT64
                ),
            }
        return {
            f"{subject.name}.encoder.onnx": normalised_encoder(subject, core, "x"),
            f"{subject.name}.decoder.onnx": decoder(subject, core, frame=core.side),
        }
