"""OpenVINO: the plain pair in the QDQ form, which its integer kernels are made from."""

from __future__ import annotations

from typing import ClassVar

import onnx

from carsam.export.profile import Files, Subject
from carsam.export.profiles.plain import Onnx
from carsam.export.qdq import as_qdq
from carsam.export.trace import Core


class OpenVino(Onnx):
    """Inputs and outputs of the profile ``onnx``; weights take a byte each, whatever their bits."""

    name: ClassVar[str] = "openvino"
    tool: ClassVar[str] = "OpenVINO"
    loops: ClassVar[bool] = False  # OpenVINO 2025.2 refuses Scan

    def files(self, subject: Subject, core: Core) -> Files:
        pair = super().files(subject, core)
        return {name: as_qdq(file) if isinstance(file, onnx.ModelProto) else file for name, file in pair.items()}
