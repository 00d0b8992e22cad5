"""What following objects through a video asks of a model: prompts on frames, then one frame after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# What a frame leaves in memory: maps of the picture with its mask, and vectors that stand for the objects.
MAPS, POINTERS = "maps", "pointers"
MEMORIES = (MAPS, POINTERS)


class Frames(Protocol):
    """A video in the model's input frame; frames are made when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """A preprocessed frame, (3, S, S)."""
        ...


@dataclass(frozen=True)
class Tracked:
    """One object on one frame.

    Attributes:
        logits: (1, h, w) low-resolution mask logits; strongly negative everywhere where the model says that the object
            is not there.
        score: Logit of the object being there.
    """

    logits: Tensor
    score: float


class Tracker(ABC):
    """Follows objects through one video. Memory does not grow with the number of frames.

    A model of a family that follows objects gives one (:meth:`carsam.models.family.Family.track`). Coordinates are
    pixels of the input frame.
    """

    @property
    @abstractmethod
    def objects(self) -> Sequence[int]:
        """Numbers of the objects with prompts, in the order in which they came."""

    @abstractmethod
    def prompt_points(self, number: int, frame: int, points: Tensor, labels: Tensor) -> Tracked:
        """Prompts an object with points on a frame; they replace what it had there.

        Args:
            number: The object's.
            frame: Index of the frame.
            points: (n, 2) as (x, y).
            labels: (n,): 1 inside, 0 outside, 2 and 3 the top left and bottom right corner of a box.
        """

    @abstractmethod
    def prompt_mask(self, number: int, frame: int, mask: Tensor) -> Tracked:
        """Prompts an object with a mask on a frame; it replaces what the object had there.

        Args:
            number: The object's.
            frame: Index of the frame.
            mask: (S, S), 1 inside and 0 outside.
        """

    @abstractmethod
    def first_prompt(self) -> int | None:
        """Index of the earliest frame with a prompt; None where there is none."""

    @abstractmethod
    def step(self, frame: int, *, reverse: bool = False) -> dict[int, Tracked]:
        """All objects on one frame, by number: as prompted where they were prompted there, from memory elsewhere.

        Args:
            frame: Index of the frame. Frames are visited in order, each once a pass.
            reverse: The pass goes backwards.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forgets prompts, objects and memory."""

    @abstractmethod
    def adopt(self, other: Tracker, frame: int, what: Collection[str] = MEMORIES) -> None:
        """Takes over what another tracker remembers of a frame, in the place of its own; for whoever measures errors.

        Args:
            other: Followed the same objects to the same frame.
            frame: Index of the frame.
            what: Of :data:`MEMORIES`.
        """

    @abstractmethod
    def remembered(self, number: int, frame: int) -> dict[str, Tensor]:
        """What one object left in memory on a frame; for whoever measures errors.

        Args:
            number: The object's.
            frame: Index of the frame; one that the memory has not dropped yet.

        Returns:
            A tensor for each of :data:`MEMORIES`.
        """

    @abstractmethod
    def kept(self) -> int:
        """Elements of all tensors that are kept for later frames."""
