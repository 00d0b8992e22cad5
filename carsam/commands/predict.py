"""``carsam predict``: masks of one image as PNG files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from carsam.commands.common import Device, open_model, out, writing
from carsam.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from carsam.predictor import SamPredictor


def predict(
    model: Annotated[
        str, typer.Argument(help="Packed folder, or a float model as for carsam quantize.", show_default=False)
    ],
    image: Annotated[Path, typer.Argument(help="Image file.", show_default=False)],
    box: Annotated[
        list[str] | None,
        typer.Option(metavar="X1,Y1,X2,Y2", help="Box in pixels. Repeatable: several objects.", show_default=False),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y[,LABEL]",
            help="Point in pixels, label 1 inside (default), 0 outside. Repeatable: all belong to one object, with "
            "--box to that box's.",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the PNG files.")] = Path("."),
    device: Device = "auto",
) -> None:
    """Write masks and an overlay of one image."""
    from PIL import Image

    from carsam.data.images import read_image
    from carsam.evaluate.overlay import color_of, overlay
    from carsam.predictor import SamPredictor

    pixels = read_image(image)
    size = pixels.shape[:2]
    boxes = read_boxes(box or [], size)
    points = read_points(point or [], size)
    if not boxes and not points:
        raise DataError("nothing to segment; give a --box or a --point.")
    if points and len(boxes) > 1:
        raise DataError("points belong to one object, so only one --box can go with them.")

    predictor = SamPredictor(open_model(model, device))
    predictor.set_image(pixels)
    picture = pixels
    # Made in memory first: a failure leaves no file, and --out is created when there is something to put there.
    files: list[tuple[str, np.ndarray]] = []
    for index, prompt in enumerate(boxes or [None]):
        mask, iou = segment(predictor, prompt, points)
        name = f"{image.stem}_mask_{index + 1}.png"
        files.append((name, mask.astype("uint8") * 255))
        picture = overlay(picture, mask, color_of(index), prompt)
        share = 100 * mask.mean()
        out.print(f"{folder / name}  predicted IoU {iou:.3f}, {share:.1f} % of the image", markup=False, soft_wrap=True)
    files.append((f"{image.stem}_overlay.png", picture))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in files:
            Image.fromarray(array).save(folder / name)
    out.print(str(folder / files[-1][0]), markup=False, soft_wrap=True)


def segment(
    predictor: SamPredictor, box: list[float] | None, points: list[tuple[float, float, int]]
) -> tuple[np.ndarray, float]:
    """Mask ``(H, W)`` bool of one object, and its predicted IoU."""
    import numpy as np

    # A single point is ambiguous: SAM then answers with part, subpart and whole, and the best by its own judgement.
    ambiguous = box is None and len(points) == 1
    masks, iou, _ = predictor.predict(
        point_coords=np.array([p[:2] for p in points]) if points else None,
        point_labels=np.array([p[2] for p in points]) if points else None,
        box=np.array(box) if box is not None else None,
        multimask_output=ambiguous,
    )
    best = int(iou.argmax())
    return masks[best], float(iou[best])


def read_boxes(texts: list[str], size: tuple[int, int]) -> list[list[float]]:
    """Boxes XYXY, clipped to an image of size ``(h, w)``.

    Raises:
        DataError: One cannot be read, is upside down, or has no area inside the image.
    """
    from carsam.data.coco import clip_boxes

    boxes = []
    for text in texts:
        numbers = _numbers(text, "--box", (4,), "x1,y1,x2,y2")
        clipped, valid = clip_boxes(numbers, size)
        if not valid[0]:
            raise DataError(
                f"the box {text} has no area inside the image, which is {size[1]} × {size[0]} pixels (width × "
                "height); a box is x1,y1,x2,y2 with x1 < x2 and y1 < y2."
            )
        boxes.append(clipped[0].tolist())
    return boxes


def read_points(texts: list[str], size: tuple[int, int]) -> list[tuple[float, float, int]]:
    """Points (x, y, label) in an image of size ``(h, w)``.

    Raises:
        DataError: One cannot be read or lies outside the image, or no point is inside the object.
    """
    points = []
    for text in texts:
        x, y, label = [*_numbers(text, "--point", (2, 3), "x,y or x,y,label"), 1.0][:3]
        if not (0 <= x <= size[1] and 0 <= y <= size[0]):
            raise DataError(
                f"the point {text} lies outside the image, which is {size[1]} × {size[0]} pixels (width × height)."
            )
        if label not in (0, 1):
            raise DataError(f"the point {text} has the label {label:g}; write 1 for inside the object, 0 for outside.")
        points.append((x, y, int(label)))
    return points


def _numbers(text: str, flag: str, counts: tuple[int, ...], form: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts or not all(map(math.isfinite, numbers)):
        raise DataError(f"cannot read {flag} {text!r}; write it as {form}.")
    return numbers
