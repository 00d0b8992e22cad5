"""``carsam predict``: masks of images, from prompts or of everything."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carsam.commands.common import Device, ImageSize, Normalise, Runtime, in_torch_only, open_model
from carsam.commands.output import STDOUT, Json, Output, Quiet
from carsam.commands.progress import Reporter
from carsam.commands.videos import FollowOptions, predict_video
from carsam.errors import ConfigError, DataError

if TYPE_CHECKING:
    from carsam.predict.automatic_masks import SamAutomaticMaskGenerator
    from carsam.predict.inputs import Photo
    from carsam.predict.predictor import SamPredictor
    from carsam.predict.prompts import Assignment, FilePrompts, Prompt
    from carsam.predict.run import Job

logger = logging.getLogger(__name__)

EVERYTHING = "Automatic masks (--everything)"
VIDEO = "Videos"
OUTPUT = "Output"


def predict(
    model: Annotated[
        str, typer.Argument(help="Packed folder, or a float model as for carsam quantize.", show_default=False)
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...",
            help="Images: files, folders, or patterns in quotes ('photos/**/*.jpg').",
            show_default=False,
        ),
    ] = None,
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
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts of every image: COCO instances (their boxes), or JSON lines with image, boxes, points and "
            "labels (see the README).",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="Masks of everything in the image, found with a grid of points.")
    ] = False,
    multimask: Annotated[
        bool, typer.Option("--multimask", help="All three masks of every prompt: part, subpart and whole.")
    ] = False,
    points_per_side: Annotated[
        int | None, typer.Option(help="Points along each side.", show_default="32", min=1, rich_help_panel=EVERYTHING)
    ] = None,
    points_per_batch: Annotated[
        int | None, typer.Option(help="Points at a time.", show_default="64", min=1, rich_help_panel=EVERYTHING)
    ] = None,
    pred_iou_thresh: Annotated[
        float | None,
        typer.Option(help="Lowest predicted IoU of a mask.", show_default="0.88", rich_help_panel=EVERYTHING),
    ] = None,
    stability_score_thresh: Annotated[
        float | None, typer.Option(help="Lowest stability.", show_default="0.95", rich_help_panel=EVERYTHING)
    ] = None,
    box_nms_thresh: Annotated[
        float | None,
        typer.Option(help="Overlap of boxes that makes two masks one.", show_default="0.7", rich_help_panel=EVERYTHING),
    ] = None,
    crop_n_layers: Annotated[
        int | None,
        typer.Option(
            help="Also search crops of the image: 1 for 2 × 2, 2 for 4 × 4 too.",
            show_default="0",
            min=0,
            max=4,
            rich_help_panel=EVERYTHING,
        ),
    ] = None,
    min_mask_region_area: Annotated[
        int | None,
        typer.Option(
            help="Fill holes and drop pieces of fewer pixels.", show_default="0", min=0, rich_help_panel=EVERYTHING
        ),
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the files.", rich_help_panel=OUTPUT)] = Path("."),
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="png|overlay|npz|coco",
            help="Files to write; repeatable, or separated by commas.",
            show_default="png,overlay",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    polygons: Annotated[
        bool, typer.Option("--polygons", help="Polygons instead of RLE in the COCO file.", rich_help_panel=OUTPUT)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that are there.", rich_help_panel=OUTPUT)
    ] = False,
    video: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a video's frames instead of images: the objects shown on the first one are followed.",
            show_default=False,
            rich_help_panel=VIDEO,
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="PNG with the objects' numbers on the first frame, instead of --box and --point.",
            show_default=False,
            rich_help_panel=VIDEO,
        ),
    ] = None,
    json: Json = None,
    quiet: Quiet = False,
    normalise: Normalise = None,
    image_size: ImageSize = None,
    device: Device = "auto",
    runtime: Runtime = "torch",
) -> None:
    """Write masks of images, from boxes and points or of everything, or of objects followed through a video.

    PNG masks are 255 inside and 0 outside. The overlay shows masks and prompts on the image.
    """
    from carsam.predict.inputs import find_photos, measure
    from carsam.predict.outputs import read_formats
    from carsam.predict.predictor import SamPredictor
    from carsam.predict.prompts import from_flags, read_prompts
    from carsam.predict.run import Job

    settings = {
        "points_per_side": points_per_side,
        "points_per_batch": points_per_batch,
        "pred_iou_thresh": pred_iou_thresh,
        "stability_score_thresh": stability_score_thresh,
        "box_nms_thresh": box_nms_thresh,
        "crop_n_layers": crop_n_layers,
        "min_mask_region_area": min_mask_region_area,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    flags = from_flags(box or [], point or [])
    if video is not None:
        in_torch_only(runtime)
        given = {"images": inputs, "--prompts": prompts, "--everything": everything, "--multimask": multimask}
        if others := [name for name, value in given.items() if value]:
            raise ConfigError(
                f"--video follows objects through one folder of frames; leave out {' and '.join(others)}."
            )
        if unknown := set(read_formats(formats or [])) - {"png", "overlay"}:
            raise ConfigError(f"--video writes png and overlay, not {', '.join(sorted(unknown))}.")
        options = FollowOptions(video, flags, mask, folder, "overlay" in read_formats(formats or []), overwrite)
        loading = {"device": device, "normalise": normalise, "image_size": image_size}
        predict_video(model, options, json, quiet=quiet, **loading)
        return
    if mask is not None:
        raise ConfigError("--mask shows objects of a video; give its frames with --video.")
    if not inputs:
        raise ConfigError("give images to segment, or a folder of frames with --video.")
    _check_flags(bool(box or point), prompts is not None, everything, multimask, settings)
    wanted = read_formats(formats or ["png", "overlay"])
    if polygons and "coco" not in wanted:
        raise ConfigError("--polygons is about the COCO file; add --format coco.")
    file = read_prompts(prompts) if prompts is not None else None
    photos, unreadable = measure(find_photos(inputs))
    if not photos:
        raise DataError(_unreadable([reason for _, reason in unreadable], len(unreadable)))
    _check_place(folder, inputs)
    output = Output(json, quiet=quiet)
    if json not in (None, STDOUT) and Path(json).exists() and not overwrite:
        raise DataError(f"{json} exists already; choose another file for --json, or replace it with --overwrite.")
    assigned = _assign(photos, flags, file)
    job = Job(
        assigned.work,
        folder,
        wanted,
        multimask,
        polygons,
        overwrite,
        assigned.image_ids,
        output.line,
    )
    predictor = SamPredictor(open_model(model, device, normalise, image_size, runtime))
    generator = _generator(predictor, settings) if everything else None
    if quiet or len(assigned.work) == 1:
        job.run(predictor, generator, lambda done, total: None)
    else:
        with Reporter("predicting") as reporter:
            job.run(predictor, generator, reporter.images)

    failed = [*(reason for _, reason in unreadable), *job.failed]
    _warn(job, generator)
    output.save({"model": model, "images": job.records, "unreadable": failed})
    if failed:
        raise DataError(_unreadable(failed, len(photos) + len(unreadable)))


def _check_flags(flags: bool, file: bool, everything: bool, multimask: bool, settings: dict[str, Any]) -> None:
    given = [
        name
        for name, there in (("--box and --point", flags), ("--prompts", file), ("--everything", everything))
        if there
    ]
    if not given:
        raise DataError("nothing to segment; give a --box or a --point, a file of --prompts, or --everything.")
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other; give one of them.")
    if everything and multimask:
        raise ConfigError("--multimask is for prompts; --everything tries all three masks of every point anyway.")
    if settings and not everything:
        raise ConfigError(f"--{next(iter(settings)).replace('_', '-')} is a setting of --everything; add that flag.")


def _check_place(folder: Path, inputs: list[str]) -> None:
    for text in inputs:
        path = Path(os.path.expanduser(text))
        if path.is_dir() and path.resolve() == folder.resolve():
            raise DataError(
                f"the output folder {folder} is also the folder of images, where masks would be taken for images next "
                "time; choose another with --out."
            )


def _assign(photos: list[Photo], flags: list[Prompt], file: FilePrompts | None) -> Assignment:
    from carsam.predict.prompts import Assignment, check

    if file is None:
        return Assignment([(photo, check(flags, photo)) for photo in photos])
    assigned = file.assign(photos)
    if assigned.without:
        logger.warning("%d of %d images have no prompts in %s, left out.", assigned.without, len(photos), file.path)
    if assigned.absent:
        logger.warning("%d of the %d images in %s are not given.", assigned.absent, len(file.by_name), file.path)
    return assigned


def _generator(predictor: SamPredictor, settings: dict[str, Any]) -> SamAutomaticMaskGenerator:
    from carsam.predict.automatic_masks import SamAutomaticMaskGenerator

    try:
        return SamAutomaticMaskGenerator(predictor.model, **settings, output_mode="uncompressed_rle")
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _warn(job: Job, generator: SamAutomaticMaskGenerator | None) -> None:
    job.notes.log(logger, len(job.work))
    if generator is not None and job.without_masks:
        logger.warning(
            "no mask in %d of %d images reaches a predicted IoU of %g and a stability of %g; lower "
            "--pred-iou-thresh and --stability-score-thresh (small or 4-bit models are less sure than SAM ViT-H, for "
            "which the defaults were made).",
            job.without_masks,
            len(job.records),
            generator.pred_iou_thresh,
            generator.stability_score_thresh,
        )
    if job.empty:
        logger.warning("left out of the COCO file, since they have no pixel: %d masks.", job.empty)
    if job.stale:
        logger.warning(
            "files of an earlier prediction that are still there: %d, such as %s.",
            len(job.stale),
            job.stale[0],
        )


def _unreadable(reasons: list[str], total: int) -> str:
    if total == 1:
        return reasons[0]
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return f"{len(reasons)} of {total} images could not be read: {' '.join(reasons[:3])}{more}"
