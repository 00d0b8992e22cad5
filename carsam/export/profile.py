"""What a profile is: the files that one tool expects, made from a model's core graphs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx

from carsam.data.images.normalisation import Normalisation
from carsam.export.trace import Core
from carsam.plugins import named_subclasses

# Frame of the tools that were made for segment-anything: the longest side of an image, and the side of a mask input.
FRAME, MASK = 1024, 256


@dataclass(frozen=True)
class Subject:
    """The model that is exported.

    Attributes:
        name: For files: letters, digits, dots and dashes.
        title: For people.
        family: Name of its family.
        onnx_files: See :class:`carsam.models.family.Family`.
        normalisation: Of its pixels.
        bits: Of its weights, the most there are; 16 for a float model.
        config: ``config.json`` of the float model.
        preprocessor: ``preprocessor_config.json``.
        metadata: Of every file.
    """

    name: str
    title: str
    family: str
    onnx_files: tuple[str, ...]
    normalisation: Normalisation
    bits: int
    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]
    metadata: Mapping[str, str]

    def properties(self, half: str, core: Core) -> dict[str, str]:
        """Metadata of the encoder's or the decoder's file."""
        return {**self.metadata, "carsam.half": half, "carsam.side": str(core.side)}


Files = dict[str, onnx.ModelProto | str]


class Profile(ABC):
    """The files of one tool; a new one is a module in ``carsam/export/profiles`` with a subclass.

    Attributes:
        name: As given to ``--profile``.
        tool: What the files are for, in a few words.
        loops: Whether the tool reads ONNX's loops.
    """

    name: ClassVar[str] = ""
    tool: ClassVar[str] = ""
    loops: ClassVar[bool] = True

    def check(self, subject: Subject, names: tuple[str, ...], side: int) -> None:  # noqa: B027 - nothing by default
        """Refuses a model that the tool cannot run.

        Args:
            subject: The model.
            names: Of the tensors between its halves.
            side: Of its input frame.

        Raises:
            ConfigError: With the reason and what to use instead.
        """

    @abstractmethod
    def files(self, subject: Subject, core: Core) -> Files:
        """Files by their path in the folder."""


def profiles() -> dict[str, Profile]:
    """All profiles by name.

    Raises:
        ConfigError: Two have one name.
    """
    classes = named_subclasses(Profile, "name", "carsam.export.profiles", what="export profile")
    return {name: cls() for name, cls in classes.items()}
