"""Exported files in the tools they are for: masks of a portrait, a square and a landscape photo by the tools' own code.

Install the tools in a folder of their own, never beside carsam (X-AnyLabeling is GPL and is only run):

    pip install --target TOOLS --no-deps samexporter osam x-anylabeling-cvhub opencv-python-headless ...
    python benchmarks/drop_in.py MODEL --tools TOOLS

Each mask is compared with that of ``carsam.SamPredictor`` on the same model and prompt, and with the annotated object.
samexporter and X-AnyLabeling enlarge photos to 1024 pixels before a smaller model's files reduce them again, and
X-AnyLabeling turns a mask into a simplified outline; so masks agree, but not to the pixel. X-AnyLabeling hands a SAM
every photo on a canvas of 1024 × 684 pixels, in which a portrait is small; the predictor is given the same canvas.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils
from scipy import ndimage

import carsam
from carsam.export.export import export
from carsam.pack.checkpoint import open_model

HERE = Path(__file__).parent
IMAGES = HERE.parent / "embedded" / "images"
# Photos of the embedded sets; the square one is a square as it is.
PHOTOS = {
    "portrait": ("evaluation", "000000006818.jpg"),
    "square": ("calibration", "000000000309.jpg"),
    "landscape": ("evaluation", "000000002592.jpg"),
}
CANVAS = (684, 1024)
TOOLS = ("samexporter", "x-anylabeling", "osam")


def largest_object(subset: str, name: str) -> np.ndarray:
    """The mask of the largest annotated object of a photo that covers less than half of it."""
    known = json.loads((IMAGES / subset / "instances.json").read_text(encoding="utf-8"))
    image = next(each for each in known["images"] if each["file_name"] == name)
    masks = []
    for annotation in known["annotations"]:
        if annotation["image_id"] != image["id"] or annotation.get("iscrowd"):
            continue
        code = annotation["segmentation"]
        if isinstance(code, list):
            code = mask_utils.merge(mask_utils.frPyObjects(code, image["height"], image["width"]))
        mask = mask_utils.decode(code).astype(bool)
        if mask.mean() < 0.5:
            masks.append(mask)
    return max(masks, key=np.sum)


def prompts_of(mask: np.ndarray) -> dict[str, dict]:
    """The box of a mask, and the point farthest from its border."""
    rows, columns = np.where(mask)
    box = [float(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), mask.shape)
    return {"box": {"box": box}, "point": {"point": [float(column), float(row)]}}


def iou(a: np.ndarray, b: np.ndarray) -> float:
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


def ours(predictor: carsam.SamPredictor, prompt: dict, stretched: bool) -> np.ndarray:
    """The predictor's mask: of a point the best of three, of a box the single one (or the best of three)."""
    if "point" in prompt:
        arguments = {"point_coords": np.array([prompt["point"]]), "point_labels": np.array([1])}
    else:
        arguments = {"box": np.array(prompt["box"])}
        if not stretched:
            # The point that tools append.
            arguments |= {"point_coords": np.zeros((1, 2)), "point_labels": np.array([-1])}
    masks, scores, _ = predictor.predict(**arguments, multimask_output="point" in prompt or stretched)
    return masks[int(np.argmax(scores))]


def on_canvas(image: np.ndarray) -> tuple[np.ndarray, float]:
    """A photo at the top left of X-AnyLabeling's canvas, and the factor that it was resized by."""
    height, width = image.shape[:2]
    factor = min(CANVAS[0] / height, CANVAS[1] / width)
    size = round(width * factor), round(height * factor)
    canvas = np.zeros((*CANVAS, 3), np.uint8)
    canvas[: size[1], : size[0]] = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    return canvas, factor


def from_canvas(mask: np.ndarray, factor: float, shape: tuple[int, int]) -> np.ndarray:
    """A mask on the canvas as one of the photo."""
    part = mask[: round(shape[0] * factor), : round(shape[1] * factor)]
    return np.asarray(Image.fromarray(part).resize((shape[1], shape[0]), Image.Resampling.NEAREST))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="packed folder or float model")
    parser.add_argument("--tools", type=Path, required=True, help="folder that the tools were installed in")
    parser.add_argument("--tool", choices=TOOLS, action="append", help="only these")
    arguments = parser.parse_args()
    predictor = carsam.SamPredictor(open_model(arguments.model))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        expected, objects = {}, {}
        print("| tool | photo | prompt | IoU with SamPredictor | with the object | SamPredictor with the object |")
        print("| --- | --- | --- | --- | --- | --- |")
        for tool in arguments.tool or TOOLS:
            export(arguments.model, folder / tool, tool)
            pyramid = _has_pyramid(folder / tool)
            tasks = []
            for photo, (subset, name) in PHOTOS.items():
                image = IMAGES / subset / "images" / name
                mask = largest_object(subset, name)
                pixels, factor = np.asarray(Image.open(image).convert("RGB")), 1.0
                if tool == "x-anylabeling" and not pyramid:
                    pixels, factor = on_canvas(pixels)
                predictor.set_image(pixels)
                for kind, prompt in prompts_of(mask).items():
                    key = f"{tool}-{photo}-{kind}"
                    scaled = {name: [factor * value for value in values] for name, values in prompt.items()}
                    expected[key] = from_canvas(ours(predictor, scaled, pyramid), factor, mask.shape)
                    objects[key] = mask
                    tasks.append({"image": str(image), "prompt": prompt, "mask": str(folder / f"{key}.png")})
            job = folder / f"{tool}.json"
            job.write_text(
                json.dumps({"tool": tool, "folder": str(folder / tool), "pyramid": pyramid, "tasks": tasks}),
                encoding="utf-8",
            )
            environment = {**os.environ, "PYTHONPATH": str(arguments.tools.resolve())}
            done = subprocess.run(
                [sys.executable, HERE / "drop_in_tools.py", job], env=environment, capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(f"{tool} failed:\n{done.stderr[-3000:]}")
            for key in [key for key in expected if key.startswith(f"{tool}-")]:
                found = np.asarray(Image.open(folder / f"{key}.png")) > 127
                photo, kind = key.removeprefix(f"{tool}-").split("-")
                both = iou(found, expected[key]), iou(found, objects[key]), iou(expected[key], objects[key])
                print(f"| {tool} | {photo} | {kind} | {both[0]:.3f} | {both[1]:.3f} | {both[2]:.3f} |", flush=True)


def _has_pyramid(folder: Path) -> bool:
    import onnx

    model = onnx.load(str(next(folder.glob("*.encoder.onnx"))), load_external_data=False)
    return len(model.graph.output) > 1


if __name__ == "__main__":
    main()
