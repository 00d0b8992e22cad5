"""``carsam evaluate``: scores of a packed or float model on a COCO data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from carsam.commands.common import Device, duration, merge_results, open_model, out
from carsam.commands.progress import Reporter
from carsam.files import write_json


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Packed folder, or a float model as for carsam quantize.", show_default=False)
    ],
    coco: Annotated[Path, typer.Option(help="COCO instances file.", show_default=False)],
    images: Annotated[Path, typer.Option(help="Folder that its file names are relative to.", show_default=False)],
    boxes: Annotated[
        Path | None,
        typer.Option(help="COCO detection results whose boxes are the prompts.", show_default="the file's own boxes"),
    ] = None,
    points: Annotated[bool, typer.Option("--points", help="Also the mean IoU after 1, 3 and 5 clicks.")] = False,
    limit: Annotated[int | None, typer.Option(help="Only the file's first images.", show_default="all", min=1)] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the scores here.", show_default=False)] = None,
    save: Annotated[
        bool, typer.Option("--save/--no-save", help="Note the scores in a packed folder's results.json.")
    ] = True,
    device: Device = "auto",
) -> None:
    """Measure masks from box prompts: segm AP, box AP, mean IoU."""
    import time

    from carsam.evaluate.coco_metrics import evaluate_coco
    from carsam.evaluate.points import evaluate_points
    from carsam.pack.checkpoint import is_packed

    sam = open_model(model, device)
    started = time.perf_counter()
    with Reporter("evaluating boxes") as reporter:
        result = evaluate_coco(sam, coco, images, detections=boxes, limit=limit, progress=reporter.images)
    scores = {**result.to_dict(), "seconds": round(time.perf_counter() - started, 2)}
    table = Table("segm AP", "box AP", "mean IoU", title=f"{model}: {result.n_prompts} boxes, {result.n_images} images")
    row = [f"{result.segm_ap:.2f}", f"{result.box_ap:.2f}", f"{result.mean_iou:.2f}"]
    if points:
        with Reporter("evaluating clicks") as reporter:
            clicked = evaluate_points(sam, coco, images, limit=limit, progress=reporter.images)
        scores["points"] = clicked.to_dict()
        for clicks, iou in clicked.mean_iou.items():
            table.add_column(f"IoU, {clicks} click{'s' if clicks > 1 else ''}")
            row.append(f"{iou:.2f}")
    for column in table.columns:
        column.justify = "right"
    table.add_row(*row)
    out.print(table)
    out.print(f"{duration(time.perf_counter() - started)}")

    if json is not None:
        write_json(json, scores)
    if save and is_packed(model):
        data = {"coco": str(coco), "images": str(images), "boxes": str(boxes) if boxes else None, "limit": limit}
        merge_results(Path(model), evaluation={**data, **scores})
