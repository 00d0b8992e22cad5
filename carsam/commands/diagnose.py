"""``carsam diagnose``: where a packed model departs from its float original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from carsam.commands.common import Device, duration, out
from carsam.commands.progress import Reporter

if TYPE_CHECKING:
    from carsam.diagnose.results import Diagnosis

# Lines of each table; the report has all.
TOP = 5


class _Stages(Reporter):
    """Progress through stages that count different things."""

    def step(self, stage: str, noun: str, done: int, total: int) -> None:
        """The callback of :func:`carsam.diagnose.run.diagnose`."""
        self._show(stage, stage, done / total, f"{noun} {done}/{total}")


def diagnose(
    float_model: Annotated[
        str, typer.Argument(metavar="FLOAT", help="The float model, as for carsam quantize.", show_default=False)
    ],
    quantized: Annotated[
        str, typer.Argument(metavar="QUANTIZED", help="The packed folder that was made from it.", show_default=False)
    ],
    data: Annotated[Path, typer.Option(help="Folder of images.", show_default=False)],
    coco: Annotated[
        Path | None,
        typer.Option(
            help="COCO file of those images: its boxes are the prompts, its masks the reference.",
            show_default="boxes of the float model's own masks",
        ),
    ] = None,
    images_limit: Annotated[int, typer.Option(help="Images to use, the first ones.", min=1)] = 8,
    prompts: Annotated[int, typer.Option(help="Box prompts of an image, at most.", min=1)] = 4,
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
    device: Device = "auto",
) -> None:
    """Show where quantization hurts: attentions, decoder stages, sites, masks."""
    import time

    from carsam.diagnose.run import diagnose as run

    started = time.perf_counter()
    with _Stages(f"diagnosing {quantized}") as reporter:
        diagnosis, folder = run(
            float_model,
            quantized,
            data,
            coco=coco,
            limit=images_limit,
            prompts=prompts,
            out=out_folder,
            with_sensitivity=sensitivity,
            device=device,
            progress=reporter.step,
        )
    summarise(diagnosis)
    out.print(
        f"{folder}: diagnosis.json and pictures, {duration(time.perf_counter() - started)}",
        markup=False,
        soft_wrap=True,
    )


def summarise(diagnosis: Diagnosis) -> None:
    """Prints the essence of a diagnosis."""
    from carsam.diagnose.samples import FLOAT_MASKS

    title = f"{diagnosis.quantized}: {diagnosis.method} at {diagnosis.bits}"
    out.print(
        f"{title}, {diagnosis.n_prompts} boxes on {diagnosis.n_images} images, against the {diagnosis.reference}",
        markup=False,
        soft_wrap=True,
    )
    floating, quantized = 100 * diagnosis.mean_iou_float, 100 * diagnosis.mean_iou_quantized
    before = "" if diagnosis.reference == FLOAT_MASKS else f"{floating:.2f} in floating point, "
    out.print(f"mean IoU {before}{quantized:.2f} quantized")
    course = diagnosis.oscillation
    first = course.moments[0].total_variation
    out.print(
        f"decoder error {course.errors[-1]:.3f} at its end, total variation {course.total_variation:.2f} along it "
        f"({first:.2f} rounded to nearest)"
    )

    table = _table("attentions that changed most", "attention", "KL", "entropy", "change", "focus kept")
    for attention in sorted(diagnosis.attentions, key=lambda each: -each.mean.kl)[:TOP]:
        mean = attention.mean
        table.add_row(
            _short(attention.name),
            f"{mean.kl:.3f}",
            f"{mean.entropy_float:.2f}",
            f"{mean.entropy_change:+.2f}",
            f"{100 * mean.focus_overlap:.0f} %",
        )
    out.print(table)
    if diagnosis.sensitivity:
        table = _table("most sensitive sites, each alone", "site", "kind", "bits", "error of logits", "IoU")
        for site in sorted(diagnosis.sensitivity, key=lambda each: -each.error)[:TOP]:
            table.add_row(_short(site.site), site.kind, str(site.bits), f"{site.error:.4f}", f"{100 * site.iou:.1f}")
        out.print(table)


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(first, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _short(name: str) -> str:
    for prefix, short in (("mask_decoder.transformer.", "decoder."), ("vision_encoder.", "encoder.")):
        name = name.replace(prefix, short)
    return name
