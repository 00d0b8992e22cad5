"""Masks of exported files beside those of the simulated model: IoU over annotated boxes.

    python benchmarks/export_masks.py PACKED --images IMAGES --coco instances.json

Both get the same pixels and boxes; masks are compared at the image's size. A code that lies half way between two may
fall to either side, by the last bit of a sum, and one such code moves all that follows. What that alone does is shown
beside: the simulated model against itself in float64, where sums are rounded otherwise.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from carsam.data.images.transforms import Geometry, Preprocessor
from carsam.export.export import export
from carsam.models.family import family_of
from carsam.models.forward import encode_image, predict_logits
from carsam.pack.checkpoint import open_model


class Pair:
    """An exported pair of the profile onnx."""

    def __init__(self, folder: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(str(folder / f"{half}.onnx"), options) for half in ("encoder", "decoder")
        )
        self.names = [each.name for each in self.encoder.get_outputs()]

    def __call__(self, pixels: torch.Tensor, boxes: torch.Tensor, pad: bool) -> torch.Tensor:
        """Logits (B, h, w) of the single masks."""
        found = dict(zip(self.names, self.encoder.run(None, {"pixel_values": pixels.numpy()})))
        corners, labels = boxes.reshape(-1, 2, 2), torch.tensor([2.0, 3.0]).expand(len(boxes), -1)
        if pad:
            corners = torch.cat([corners, torch.zeros(len(boxes), 1, 2)], dim=1)
            labels = torch.cat([labels, -torch.ones(len(boxes), 1)], dim=1)
        shapes = {each.name: each.shape for each in self.decoder.get_inputs()}
        inputs = {
            **found,
            "point_coords": corners.numpy(),
            "point_labels": labels.numpy(),
            "mask_input": np.zeros((1, *shapes["mask_input"][1:]), np.float32),
            "has_mask_input": np.zeros(1, np.float32),
            "orig_im_size": np.ones(2, np.float32),
        }
        return torch.from_numpy(self.decoder.run(["low_res_masks"], inputs)[0][:, 0])


def ious(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """IoU of masks (B, h, w) of logits; 1 where both are empty."""
    a, b = a > 0, b > 0
    union = (a | b).flatten(1).sum(1)
    return torch.where(union > 0, (a & b).flatten(1).sum(1) / union.clamp(min=1), 1.0).tolist()


def prompted(
    coco: Path, folder: Path, preprocess: Preprocessor, limit: int
) -> Iterator[tuple[torch.Tensor, Geometry, torch.Tensor]]:
    """Of every image with boxes: its pixels (1, 3, S, S), its geometry, and the boxes (N, 4) in the input frame."""
    known = json.loads(coco.read_text(encoding="utf-8"))
    boxes: dict[int, list[list[float]]] = {}
    for annotation in known["annotations"]:
        x, y, width, height = annotation["bbox"]
        if not annotation.get("iscrowd"):
            boxes.setdefault(annotation["image_id"], []).append([x, y, x + width, y + height])
    images = [image for image in known["images"] if image["id"] in boxes]
    for image in images[: limit or None]:
        values, geometry = preprocess(np.asarray(Image.open(folder / image["file_name"]).convert("RGB")))
        yield values, geometry, geometry.boxes_to_input(torch.tensor(boxes[image["id"]], dtype=torch.float32))


def parsed(description: str | None) -> argparse.Namespace:
    """The command line: a packed folder, images and their boxes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="packed folder")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--coco", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=0, help="images")
    return parser.parse_args()


def main() -> None:
    arguments = parsed(__doc__)
    model = open_model(arguments.model)
    family, preprocess = family_of(model), Preprocessor.for_model(model)
    wide = copy.deepcopy(model).double()
    exported, itself, images = [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        export(arguments.model, Path(folder) / "pair")
        pair = Pair(Path(folder) / "pair")
        for values, geometry, prompts in prompted(arguments.coco, arguments.images, preprocess, arguments.limit):
            images += 1

            def whole(logits: torch.Tensor, geometry: Geometry = geometry) -> torch.Tensor:
                return geometry.masks_to_original(logits, preprocess.image_size)

            expected = whole(simulated(model, values, prompts))
            # SAM 2's predictors append a point that is none to a box, SAM's do not.
            exported += ious(whole(pair(values, prompts, pad=getattr(family, "stretched", False))), expected)
            itself += ious(whole(simulated(wide, values, prompts)), expected)
    print(f"{arguments.model}: {len(exported)} boxes on {images} images")
    print("| compared with the simulated model | mean IoU | worst | below 0.95 |")
    print("| --- | --- | --- | --- |")
    for name, values in (("exported files", exported), ("itself in float64", itself)):
        low = sum(value < 0.95 for value in values)
        print(f"| {name} | {np.mean(values):.4f} | {min(values):.3f} | {low} of {len(values)} |")


def simulated(model: torch.nn.Module, pixels: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Logits (B, h, w) of the single masks."""
    return predict_logits(model, encode_image(model, pixels), boxes=boxes)[0][:, 0]


if __name__ == "__main__":
    main()
