"""``carsam diagnose``: where a packed model departs from its float original."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from carsam.commands.common import Device, Normalise, duration
from carsam.commands.output import Json, Output, Quiet, renamed
from carsam.commands.progress import Reporter
from carsam.errors import ConfigError
from carsam.models.names import names_of_type
from carsam.pack.folder import read_config

if TYPE_CHECKING:
    from carsam.diagnose.results import Diagnosis

# Lines of each table; the report has all.
TOP = 5
# As in carsam.diagnose.run, which takes seconds to import.
N_IMAGES, N_PROMPTS = 8, 4


def diagnose(
    float_model: Annotated[
        str, typer.Argument(metavar="FLOAT", help="The float model, as for carsam quantize.", show_default=False)
    ],
    quantized: Annotated[
        str, typer.Argument(metavar="QUANTIZED", help="The packed folder that was made from it.", show_default=False)
    ],
    images: Annotated[Path | None, typer.Option(help="Folder of images.", show_default="required")] = None,
    data: Annotated[Path | None, typer.Option(hidden=True)] = None,
    coco: Annotated[
        Path | None,
        typer.Option(
            help="COCO file of those images: its boxes are the prompts, its masks the reference.",
            show_default="boxes of the float model's own masks",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Images to use, the first ones.", min=1, show_default=str(N_IMAGES))
    ] = None,
    images_limit: Annotated[int | None, typer.Option(hidden=True, min=1)] = None,
    boxes_per_image: Annotated[
        int | None, typer.Option(help="Box prompts of an image, at most.", min=1, show_default=str(N_PROMPTS))
    ] = None,
    prompts: Annotated[int | None, typer.Option(hidden=True, min=1)] = None,
    out_folder: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder to write; a diagnosis in it is replaced.", show_default="QUANTIZED/diagnosis"
        ),
    ] = None,
    sensitivity: Annotated[
        bool,
        typer.Option("--sensitivity/--no-sensitivity", help="Also round every site alone (the longest part)."),
    ] = True,
    normalise: Normalise = None,
    device: Device = "auto",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Show where quantization hurts: attentions, decoder stages, sites, masks."""
    output = Output(json, quiet=quiet)
    images = renamed("--images", images, quiet=quiet, data=data)
    limit = renamed("--limit", limit, quiet=quiet, images_limit=images_limit)
    boxes_per_image = renamed("--boxes-per-image", boxes_per_image, quiet=quiet, prompts=prompts)
    if images is None:
        raise ConfigError("images are missing; name their folder with --images.")
    with Reporter(f"diagnosing {quantized}", quiet=quiet) as reporter:
        from carsam.diagnose.run import diagnose as run
        from carsam.pack.source import packed_folder

        diagnosis, folder = run(
            float_model,
            quantized,
            images,
            coco=coco,
            limit=limit or N_IMAGES,
            prompts=boxes_per_image or N_PROMPTS,
            out=out_folder,
            with_sensitivity=sensitivity,
            device=device,
            normalise=normalise,
            progress=reporter.step,
        )
    model_type = read_config(packed_folder(quantized) or Path(quantized)).get("model_type")
    summarise(diagnosis, output, names_of_type(model_type).short)
    output.line(f"{folder}: diagnosis.json and pictures, {duration(reporter.seconds)}")
    output.save(diagnosis.to_dict())


def summarise(diagnosis: Diagnosis, output: Output, short: Callable[[str], str]) -> None:
    """Prints the essence of a diagnosis.

    Args:
        diagnosis: The diagnosis.
        output: Where to.
        short: Shortens the name of a site.
    """
    from carsam.prompts.diagnosis import FLOAT_MASKS

    title = f"{diagnosis.quantized}: {diagnosis.method} at {diagnosis.bits}"
    output.line(
        f"{title}, {diagnosis.n_prompts} boxes on {diagnosis.n_images} images, against the {diagnosis.reference}"
    )
    floating, quantized = 100 * diagnosis.mean_iou_float, 100 * diagnosis.mean_iou_quantized
    before = "" if diagnosis.reference == FLOAT_MASKS else f"{floating:.2f} in floating point, "
    output.line(f"mean IoU {before}{quantized:.2f} quantized")
    course = diagnosis.oscillation
    first = course.moments[0].total_variation
    output.line(
        f"decoder error {course.errors[-1]:.3f} at its end, total variation {course.total_variation:.2f} along it "
        f"({first:.2f} rounded to nearest)"
    )

    table = _table("attentions that changed most", "attention", "KL", "entropy", "change", "focus kept")
    for attention in sorted(diagnosis.attentions, key=lambda each: -each.mean.kl)[:TOP]:
        mean = attention.mean
        table.add_row(
            short(attention.name),
            f"{mean.kl:.3f}",
            f"{mean.entropy_float:.2f}",
            f"{mean.entropy_change:+.2f}",
            f"{100 * mean.focus_overlap:.0f} %",
        )
    output.print(table)
    if diagnosis.sensitivity:
        table = _table("most sensitive sites, each alone", "site", "kind", "bits", "error of logits", "IoU")
        for site in sorted(diagnosis.sensitivity, key=lambda each: -each.error)[:TOP]:
            table.add_row(short(site.site), site.kind, str(site.bits), f"{site.error:.4f}", f"{100 * site.iou:.1f}")
        output.print(table)


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(first, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table
