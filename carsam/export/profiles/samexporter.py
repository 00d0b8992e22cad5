"""samexporter (PyPI, MIT): ``python -m samexporter.inference --encoder_model … --decoder_model …``."""

from __future__ import annotations

from typing import ClassVar

from carsam.export import segment_anything_2 as pyramid
from carsam.export.profile import FRAME, Files, Profile, Subject
from carsam.export.segment_anything import decoder, pixel_encoder
from carsam.export.trace import Core


class SamExporter(Profile):
    """The pair that its exporters write with ``--use-preprocess`` and ``--return-single-mask``.

    Its inference resizes every image to 1024 pixels and gives coordinates there; for a model with a smaller frame the
    files do the rest.
    """

    name: ClassVar[str] = "samexporter"
    tool: ClassVar[str] = "samexporter's inference"

    def files(self, subject: Subject, core: Core) -> Files:
        if pyramid.is_pyramid(core):
            return {
                f"{subject.name}.encoder.onnx": pyramid.encoder(subject, core, "image"),
                f"{subject.name}.decoder.onnx": pyramid.samexporter_decoder(subject, core),
            }
        return {
            f"{subject.name}.encoder.onnx": pixel_encoder(subject, core, FRAME),
            f"{subject.name}.decoder.onnx": decoder(subject, core, frame=FRAME),
        }
