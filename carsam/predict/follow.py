"""``carsam predict --video`` from the checked arguments to the files: a mask, and an overlay, for every frame."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel

from carsam.data.video.frames import Video
from carsam.data.video.masks import VOID, palette, read_mask, write_mask
from carsam.errors import CarsamError, DataError
from carsam.output.files import whole_file
from carsam.predict.inputs import Photo
from carsam.predict.outputs import write_picture
from carsam.predict.prompts import Prompt, check
from carsam.predict.video import SamVideoPredictor

# How strongly an object's colour covers the frame.
_OPACITY = 0.55


@dataclass(frozen=True)
class Shown:
    """An object as it is shown on the first frame: by a mask ``(h, w)`` bool, or by a box and points."""

    number: int
    mask: np.ndarray | None = None
    prompt: Prompt | None = None


@dataclass
class Following:
    """Objects followed through a video into a folder of masks.

    Attributes:
        video: The frames.
        folder: Where the masks go, a PNG a frame whose palette numbers are the objects'.
        overlay: Also draw them over the frames.
        overwrite: Replace files that are there.
    """

    video: Video
    folder: Path
    overlay: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """Refuses a place where the files cannot go, before anything is computed.

        Raises:
            CarsamError: It is the folder of frames, files are there already, or it cannot be written.
        """
        if os.path.realpath(self.folder) == os.path.realpath(self.video.folder):
            raise CarsamError(f"{self.folder} holds the frames; choose another folder for the masks with --out.")
        if self.folder.is_symlink() and not self.folder.exists():
            raise CarsamError(f"{self.folder} is a link to a folder that is not there; create it, or remove the link.")
        there = [path for name in self.video.names for path in self._paths(name) if path.exists()]
        if there and not self.overwrite:
            raise CarsamError(
                f"{there[0]} exists already; choose another folder with --out, or replace files with --overwrite."
            )
        place = next(folder for folder in (self.folder.absolute(), *self.folder.absolute().parents) if folder.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise CarsamError(f"cannot write {self.folder}: {place} is not a folder that can be written to.")

    def shown(self, prompts: Sequence[Prompt], mask: Path | None) -> list[Shown]:
        """The objects, checked against the first frame.

        Raises:
            DataError: The mask is empty or has another size; a box or point lies outside the frame, or is on 0..1; or
                there are more objects than a mask has numbers for.
        """
        if mask is not None:
            numbers = read_mask(mask, self.video.size)
            found = [Shown(int(number), mask=numbers == number) for number in np.unique(numbers) if number]
            if not found:
                raise DataError(f"the mask {mask} is empty: there is nothing to follow.")
            return found
        if len(prompts) >= VOID:
            raise DataError(f"masks hold the numbers of {VOID - 1} objects at most, not of {len(prompts)}.")
        prompts = check(prompts, Photo(self.video.paths[0], size=self.video.size))
        return [Shown(number, prompt=prompt) for number, prompt in enumerate(prompts, start=1)]

    def run(
        self, model: PreTrainedModel, objects: Sequence[Shown], progress: Callable[[int, int], None]
    ) -> list[dict[str, Any]]:
        """Follows the objects and writes a file, or two, for every frame.

        Args:
            model: Of a family that follows objects.
            objects: From :meth:`shown`.
            progress: Called with the frames done and their number.

        Returns:
            For every object its number, on how many frames it has pixels, and on how many it has none.

        Raises:
            CarsamError: The model knows images only, a frame is damaged, or a file cannot be written.
            KeyboardInterrupt: With what was finished.
        """
        predictor = SamVideoPredictor(model)
        state = predictor.init_state(self.video)
        for each in objects:
            if each.mask is not None:
                predictor.add_new_mask(state, 0, each.number, each.mask)
                continue
            points = np.array([point[:2] for point in each.prompt.points]).reshape(-1, 2)
            labels = np.array([point[2] for point in each.prompt.points])
            with_points = {"points": points, "labels": labels} if len(points) else {}
            box = None if each.prompt.box is None else np.array(each.prompt.box)
            predictor.add_new_points_or_box(state, 0, each.number, box=box, **with_points)
        present = {each.number: 0 for each in objects}
        total, done = len(self.video), 0
        try:
            for frame, ids, logits in predictor.propagate_in_video(state):
                best = logits[:, 0].max(0)
                numbers = np.where((best.values > 0).cpu().numpy(), np.array(ids)[best.indices.cpu().numpy()], 0)
                for number in np.unique(numbers[numbers > 0]):
                    present[int(number)] += 1
                self._write(frame, numbers.astype(np.uint8))
                done = frame + 1
                progress(done, total)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted after {done} of {total} frames; their masks are in {self.folder}."
            ) from None
        return [{"object": n, "frames": count, "frames_without": total - count} for n, count in present.items()]

    def _paths(self, name: str) -> list[Path]:
        paths = [self.folder / f"{name}.png"]
        return [*paths, self.folder / "overlay" / f"{name}.png"] if self.overlay else paths

    def _write(self, frame: int, numbers: np.ndarray) -> None:
        mask, *overlay = self._paths(self.video.names[frame])
        with whole_file(mask) as temporary:
            write_mask(temporary, numbers)
        if overlay:
            colours = np.array(palette(), np.float32).reshape(256, 3)[numbers]
            pixels = self.video.frame(frame).astype(np.float32)
            inside = (numbers > 0)[..., None]
            blended = np.where(inside, (1 - _OPACITY) * pixels + _OPACITY * colours, pixels)
            write_picture(overlay[0], np.array(Image.fromarray(blended.astype(np.uint8))))
