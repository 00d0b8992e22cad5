"""osam (PyPI, MIT), the models of labelme: a pair that its class ``Sam`` runs."""

from __future__ import annotations

from typing import ClassVar

from carsam.export.profile import Files, Profile, Subject
from carsam.export.segment_anything import decoder, normalised_encoder
from carsam.export.trace import Core


class Osam(Profile):
    """The input is called ``x`` and normalised by the tool, which reads the frame's side from its shape."""

    name: ClassVar[str] = "osam"
    tool: ClassVar[str] = "osam and labelme"

    def files(self, subject: Subject, core: Core) -> Files:
        return {
            f"{subject.name}.encoder.onnx": normalised_encoder(subject, core, "x"),
            f"{subject.name}.decoder.onnx": decoder(subject, core, frame=core.side),
        }
