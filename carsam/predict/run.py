"""``carsam predict`` from the checked arguments to the files: nothing is computed before all of it can be written."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from carsam.data.images.reading import read_image
from carsam.data.notes import Notes
from carsam.errors import CarsamError, DataError
from carsam.predict import drawing, outputs
from carsam.predict.automatic_masks import SamAutomaticMaskGenerator
from carsam.predict.inputs import Photo, shown
from carsam.predict.masks import FoundMask, describe, segment_everything, segment_prompts
from carsam.predict.names import check_not_inputs, earlier_outputs, output_stems
from carsam.predict.predictor import SamPredictor
from carsam.predict.prompts import Prompt


@dataclass
class Job:
    """What to predict and where to.

    Attributes:
        work: The images with their prompts; no prompts where everything is segmented.
        folder: The output folder.
        formats: Of :data:`carsam.predict.outputs.FORMATS`.
        multimask: All three masks of a prompt.
        polygons: COCO segmentations are polygons.
        overwrite: Replace files that are there.
        image_ids: COCO ids by path.
        say: Receives a line for every mask and file.
    """

    work: Sequence[tuple[Photo, Sequence[Prompt]]]
    folder: Path
    formats: Sequence[str]
    multimask: bool = False
    polygons: bool = False
    overwrite: bool = False
    image_ids: dict[Path, Any] = field(default_factory=dict)
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.without_masks = 0
        self.notes = Notes()
        self._stems = output_stems([photo for photo, _ in self.work])
        self._coco = outputs.CocoFile(self.polygons) if "coco" in self.formats else None
        self._check_outputs()

    @property
    def coco_path(self) -> Path:
        """Where the COCO file goes."""
        return self.folder / outputs.COCO_NAME

    def _check_outputs(self) -> None:
        photos = [photo for photo, _ in self.work]
        earlier = earlier_outputs(self.folder, self._stems, self.formats)
        if self._coco is not None and self.coco_path.exists():
            earlier[Path(outputs.COCO_NAME)] = [self.coco_path]
        there = [path for paths in earlier.values() for path in paths]
        if there and not self.overwrite:
            more = f" and {len(there) - 1} more" if len(there) > 1 else ""
            raise CarsamError(
                f"{shown(there[0])}{more} exist already; choose another folder with --out, or replace them with "
                "--overwrite."
            )
        check_not_inputs([*there, *(self.folder / f"{stem}_overlay.png" for stem in self._stems)], photos)
        self._earlier = set(there)
        place = self.folder
        while not place.exists() and place != place.parent:
            if place.is_symlink():
                raise CarsamError(
                    f"{place} is a link to {os.readlink(place)}, which is not there; choose another --out."
                )
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK):
            why = "Permission denied" if place.is_dir() else f"{place} is a file"
            raise CarsamError(f"cannot write {self.folder}: {why}.")

    def run(
        self,
        predictor: SamPredictor,
        generator: SamAutomaticMaskGenerator | None,
        progress: Callable[[int, int], None],
    ) -> None:
        """Predicts and writes, image by image; an image that cannot be read is noted and left out.

        Args:
            predictor: For prompts.
            generator: For everything; None with prompts.
            progress: Called with the images done and their number.

        Raises:
            CarsamError: A file cannot be written.
            KeyboardInterrupt: With what was finished.
        """
        total = len(self.work)
        try:
            for index, ((photo, prompts), stem) in enumerate(zip(self.work, self._stems)):
                progress(index, total)
                try:
                    image = read_image(photo.path, apply_exif=photo.upright, notes=self.notes)
                    self._require_size(image, photo)
                except DataError as error:
                    self.failed.append(str(error))
                    continue
                self._predict(photo, image, prompts, stem, predictor, generator)
            progress(total, total)
        except KeyboardInterrupt:
            self._finish()
            done = len(self.records)
            raise KeyboardInterrupt(
                f"interrupted after {done} of {total} images; their files are in {self.folder}."
            ) from None
        self._finish()

    @staticmethod
    def _require_size(image: np.ndarray, photo: Photo) -> None:
        if image.shape[:2] != photo.size:
            raise DataError(f"the image {photo.path} changed, or its header is wrong; predict it again.")

    def _predict(
        self,
        photo: Photo,
        image: np.ndarray,
        prompts: Sequence[Prompt],
        stem: Path,
        predictor: SamPredictor,
        generator: SamAutomaticMaskGenerator | None,
    ) -> None:
        small = drawing.small_copy(image) if "overlay" in self.formats else None
        if generator is not None:
            found = segment_everything(generator, image)
        else:
            predictor.set_image(image)
            found = segment_prompts(predictor, prompts, self.multimask)
        del image
        masks, described = [], []
        for mask in found:
            files = {}
            if "png" in self.formats:
                path = self.folder / outputs.mask_name(stem, mask)
                outputs.write_mask(path, mask)
                self._written(path)
                files["png"] = shown(path)
            masks.append(mask)
            described.append(describe(mask, files))
            if files:
                self.say(f"{files['png']}  {_summary(mask)}")
        if "png" not in self.formats:
            self.say(f"{shown(photo.path)}  {_summary(masks[0]) if len(masks) == 1 else f'{len(masks)} masks'}")
        record = {"image": shown(photo.path), "height": photo.size[0], "width": photo.size[1], "masks": described}
        if small is not None:
            path = self.folder / f"{stem}_overlay.png"
            outputs.write_picture(path, drawing.draw(small, photo.size, masks, prompts))
            record["overlay"] = self._said(path)
        if "npz" in self.formats:
            path = self.folder / f"{stem}.npz"
            outputs.write_npz(path, masks, photo.size)
            record["npz"] = self._said(path)
        if self._coco is not None:
            self._coco.add(photo, self.image_ids.get(photo.path), masks)
        self.without_masks += not masks
        self.records.append(record)

    def _written(self, path: Path) -> None:
        self._earlier.discard(path)

    def _said(self, path: Path) -> str:
        self._written(path)
        self.say(shown(path))
        return shown(path)

    def _finish(self) -> None:
        if self._coco is not None and self._coco.images:
            self._coco.write(self.coco_path)
            self._said(self.coco_path)

    @property
    def empty(self) -> int:
        """Masks without a pixel, which the COCO file leaves out."""
        return 0 if self._coco is None else self._coco.empty

    @property
    def stale(self) -> list[Path]:
        """Files of an earlier prediction of the same images that were not replaced."""
        return sorted(self._earlier)


def _summary(mask: FoundMask) -> str:
    share = 100 * mask.area / (mask.size[0] * mask.size[1])
    return f"predicted IoU {mask.predicted_iou:.3f}, {share:.1f} % of the image"
