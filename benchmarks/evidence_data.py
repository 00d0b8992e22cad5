"""What rows of evidence are made of: models and images by name, wherever they lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carsam.errors import DataError
from carsam.output.files import write_json

ROOT = Path(__file__).resolve().parents[1]
# Of the pool that is split: as many calibrate as in a row that is not held out.
CALIBRATION_IMAGES = 32
FOLDERS = {
    "medical": ("medical/calibration", "medical/eval-a"),
    "coco": ("coco-train100", "coco-val50"),
}


@dataclass(frozen=True)
class Images:
    """A data set: annotations and the folder that their file names are relative to."""

    coco: Path
    images: Path

    def sources(self) -> dict[str, str]:
        """The modality of each image by file name; empty where the file does not say."""
        entries = json.loads(self.coco.read_text(encoding="utf-8"))["images"]
        return {entry["file_name"]: entry["source"] for entry in entries if "source" in entry}


@dataclass(frozen=True)
class Places:
    """Where models and data lie.

    Attributes:
        data: Folder with ``medical`` and the COCO sets.
        litemedsam: LiteMedSAM's checkpoint.
        work: Folder for what is shared between rows: split annotation files and finished units.
    """

    data: Path = ROOT.parent / "shared" / "data"
    litemedsam: Path = ROOT / "runs" / "litemedsam" / "lite_medsam.pth"
    work: Path = ROOT / "runs" / "evidence"
    embedded: Path = ROOT / "embedded" / "sam-nano-256"
    embedded_sam2: Path = ROOT / "embedded" / "sam2-nano-256"

    def calibration_and_evaluation(self, name: str, held_out: bool) -> tuple[Images, Images]:
        """Both data sets of a row.

        Args:
            name: ``medical``, ``coco`` or ``embedded``.
            held_out: Split the calibration set instead: the evaluation set is not touched.

        Raises:
            DataError: They are not there.
        """
        if name == "embedded":
            folders = [ROOT / "embedded" / "images" / each for each in ("calibration", "evaluation")]
        else:
            folders = [self.data / each for each in FOLDERS[name]]
        calibration, evaluation = (_images(folder) for folder in folders)
        if not held_out:
            return calibration, evaluation
        whole = json.loads(calibration.coco.read_text(encoding="utf-8"))
        parts = []
        for part, names in zip(("calibrate", "judge"), split(whole["images"])):
            path = self.work / "split" / f"{name}-{part}.json"
            write_json(path, subset(whole, names))
            parts.append(Images(path, calibration.images))
        return parts[0], parts[1]


def _images(folder: Path) -> Images:
    found = Images(folder / "instances.json", folder / "images")
    if not found.coco.is_file() or not found.images.is_dir():
        raise DataError(f"there is no data set in {folder}; name the folder that holds it with --data-root.")
    return found


def split(images: list[dict[str, Any]]) -> tuple[set[str], set[str]]:
    """File names of the images that calibrate and of those that judge, no group (a patient) in both.

    Modalities are shared out evenly, and nothing random decides: images are taken group by group in order of their
    modality, each to the part that is behind its share.

    Args:
        images: Of a COCO file, where they say so with ``source`` and ``group``.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for image in images:
        key = (image.get("source", ""), image.get("group", image["file_name"]))
        groups.setdefault(key, []).append(image["file_name"])
    share = min(CALIBRATION_IMAGES / len(images), 0.55)  # of a small set, about half
    calibrate: set[str] = set()
    judge: set[str] = set()
    for _, names in sorted(groups.items()):
        seen = len(calibrate) + len(judge) + len(names)
        behind = len(calibrate) + len(names) / 2 <= share * seen
        (calibrate if behind else judge).update(names)
    return calibrate, judge


def subset(coco: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """A COCO file with some of its images."""
    images = [image for image in coco["images"] if image["file_name"] in names]
    ids = {image["id"] for image in images}
    annotations = [each for each in coco["annotations"] if each["image_id"] in ids]
    return {**coco, "images": images, "annotations": annotations}
