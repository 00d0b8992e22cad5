"""Runs one tool's own code on exported files; called by ``drop_in.py`` in a process where the tool is installed.

    python benchmarks/drop_in_tools.py JOB.json

The job names the tool, the folder of files, and images with their prompts (in pixels); masks are written as PNG.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image


def samexporter(folder: Path, pyramid: bool):
    import cv2
    from samexporter.sam2_onnx import SegmentAnything2ONNX
    from samexporter.sam_onnx import SegmentAnythingONNX

    encoder, decoder = (str(next(folder.glob(f"*.{half}.onnx"))) for half in ("encoder", "decoder"))
    model = (SegmentAnything2ONNX if pyramid else SegmentAnythingONNX)(encoder, decoder)

    def predict(image: str, prompt: dict) -> np.ndarray:
        embedding = model.encode(cv2.imread(image))
        marks = [{"type": "rectangle", "data": prompt["box"]}] if "box" in prompt else []
        if "point" in prompt:
            marks = [{"type": "point", "data": prompt["point"], "label": 1}]
        return np.asarray(model.predict_masks(embedding, marks))[0][0] > 0

    return predict


def x_anylabeling(folder: Path, pyramid: bool):
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    import cv2
    from PyQt6.QtGui import QImage
    from PyQt6.QtWidgets import QApplication

    application = QApplication([])
    import anylabeling.config
    from anylabeling.services.auto_labeling.segment_anything import SegmentAnything
    from anylabeling.services.auto_labeling.segment_anything_2 import SegmentAnything2

    # The application's own settings, empty, and a custom model's description as its manager reads it.
    settings = folder / "settings.txt"
    settings.write_text("{}", encoding="utf-8")
    anylabeling.config.current_config_file = str(settings)
    described = next(folder.glob("*.yaml"))
    config = {**yaml.safe_load(described.read_text(encoding="utf-8")), "config_file": str(described)}
    model = (SegmentAnything2 if pyramid else SegmentAnything)(config, print)
    model.set_output_mode("polygon")

    def predict(image: str, prompt: dict) -> np.ndarray:
        marks = [{"type": "rectangle", "data": prompt["box"]}] if "box" in prompt else []
        if "point" in prompt:
            marks = [{"type": "point", "data": prompt["point"], "label": 1}]
        model.set_auto_labeling_marks(marks)
        shapes = model.predict_shapes(QImage(image), image).shapes
        width, height = Image.open(image).size
        mask = np.zeros((height, width), np.uint8)
        for shape in shapes:
            corners = np.array([[point.x(), point.y()] for point in shape.points], np.int32)
            cv2.fillPoly(mask, [corners], 1)
        assert application is not None
        return mask > 0

    return predict


def osam(folder: Path, pyramid: bool):
    # Its files are known by their digest and lie under the user's home.
    os.environ["HOME"] = str(folder)
    import osam.types
    from osam._models.sam._models import Sam
    from osam._models.sam2._models import Sam2

    blobs = {}
    for half in ("encoder", "decoder"):
        path = next(folder.glob(f"*.{half}.onnx"))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        blobs[half] = osam.types.Blob(url=f"file://{path}", hash=f"sha256:{digest}")
        os.makedirs(os.path.dirname(blobs[half].path), exist_ok=True)
        shutil.copy(path, blobs[half].path)

    base = Sam2 if pyramid else Sam
    ours = type("Ours", (base,), {"name": "ours", "_blobs": blobs})()

    def predict(image: str, prompt: dict) -> np.ndarray:
        if "box" in prompt:
            points, labels = np.reshape(prompt["box"], (2, 2)), [2, 3]
        else:
            points, labels = np.reshape(prompt["point"], (1, 2)), [1]
        asked = osam.types.Prompt(points=points.astype(np.float32), point_labels=np.array(labels, np.int32))
        pixels = np.asarray(Image.open(image).convert("RGB"))
        (found,) = ours.generate(osam.types.GenerateRequest(model="ours", image=pixels, prompt=asked)).annotations
        mask = np.zeros(pixels.shape[:2], bool)
        place = found.bounding_box
        mask[place.ymin : place.ymax + 1, place.xmin : place.xmax + 1] = found.mask
        return mask

    return predict


TOOLS = {"samexporter": samexporter, "x-anylabeling": x_anylabeling, "osam": osam}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    predict = TOOLS[job["tool"]](Path(job["folder"]), job["pyramid"])
    for task in job["tasks"]:
        mask = predict(task["image"], task["prompt"])
        Image.fromarray(mask.astype(np.uint8) * 255).save(task["mask"])


if __name__ == "__main__":
    main()
