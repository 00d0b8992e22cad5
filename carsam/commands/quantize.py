"""``carsam quantize``: a float model and some images in, a packed folder out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carsam.bits.plan import stated_bits
from carsam.commands.common import METHODS, Device, ImageSize, Normalise, complete_from, float16_bytes, megabytes
from carsam.commands.output import Json, Output, Quiet, finite, renamed
from carsam.commands.progress import Reporter
from carsam.errors import ConfigError
from carsam.output.signals import message

if TYPE_CHECKING:
    from carsam.pipeline import QuantizeResult

INTERRUPTED = "interrupted. Where a unit was finished, the same command with --resume continues from there."
_DATA, _METHOD, _RUN = "Calibration data", "Method", "Run"


def quantize(
    model: Annotated[
        str,
        typer.Argument(
            help="Hub id (facebook/sam-vit-base), transformers folder, or Meta's .pth file.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of calibration images, or root of a data set of videos (SAM 2 with memory).",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None,
    data_coco: Annotated[
        Path | None,
        typer.Option(
            help="COCO file of those images; its boxes are the prompts.", show_default=False, rich_help_panel=_DATA
        ),
    ] = None,
    coco: Annotated[Path | None, typer.Option(hidden=True)] = None,
    boxes: Annotated[Path | None, typer.Option(hidden=True)] = None,
    box_source: Annotated[
        str | None,
        typer.Option(
            metavar="auto|grid",
            help="Without a COCO file: boxes of the model's own masks, or a grid of boxes.",
            show_default="auto",
            autocompletion=complete_from("auto", "grid"),
            rich_help_panel=_DATA,
        ),
    ] = None,
    n_images: Annotated[
        int | None, typer.Option(help="Images to use.", show_default="32", rich_help_panel=_DATA)
    ] = None,
    boxes_per_image: Annotated[
        int | None, typer.Option(help="Box prompts of an image, at most.", show_default="6", rich_help_panel=_DATA)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of everything random.", show_default="0", rich_help_panel=_DATA)
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            help="Bits of weights and activations.",
            show_default="w4a4",
            rich_help_panel=_METHOD,
            autocompletion=complete_from("w4a4", "w6a6", "w8a8", "w4a8"),
        ),
    ] = None,
    bits_for: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=BITS",
            help="Other bits for some sites, as '*.neck.*=w8a8' or '*.probs=w4a8'. Repeatable; the last match wins.",
            show_default=False,
            rich_help_panel=_METHOD,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="4.0bits|6MB",
            help="Choose 3 to 8 bits for every site: mean bits, or the size of the weights' file.",
            show_default=False,
            rich_help_panel=_METHOD,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="fast|balanced|best",
            help="Of car-sam-plus: nothing reconstructed, its default, or the finished model tuned as well.",
            show_default=False,
            autocompletion=complete_from("fast", "balanced", "best"),
            rich_help_panel=_METHOD,
        ),
    ] = None,
    decoder_only: Annotated[
        bool,
        typer.Option(
            "--decoder-only", help="Leave the image encoder in floating point (16 bits).", rich_help_panel=_METHOD
        ),
    ] = False,
    method: Annotated[
        str | None,
        typer.Option(
            help="See carsam methods.",
            show_default="car-sam-plus",
            rich_help_panel=_METHOD,
            autocompletion=complete_from(*METHODS),
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Optimiser steps of every unit, and of tuning the finished model where the preset does.",
            show_default="the method's",
            rich_help_panel=_METHOD,
            min=0,
            max=10_000_000,
        ),
    ] = None,
    no_mac: Annotated[
        bool, typer.Option("--no-mac", help="Leave out MatMul-Aware Compensation.", rich_help_panel=_METHOD)
    ] = False,
    no_jcar: Annotated[
        bool,
        typer.Option(
            "--no-jcar", help="Reconstruct decoder modules one by one (granularity module).", rich_help_panel=_METHOD
        ),
    ] = False,
    granularity: Annotated[
        str | None,
        typer.Option(
            metavar="module|pair|block|decoder",
            help="Decoder units; pair is JCAR.",
            show_default="pair",
            autocompletion=complete_from("module", "pair", "block", "decoder"),
            rich_help_panel=_METHOD,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other setting of the method, as mac.solver=pooled. Repeatable; see carsam methods NAME.",
            show_default=False,
            rich_help_panel=_METHOD,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="recipe.yaml of an earlier run; other flags override it.", show_default=False, rich_help_panel=_METHOD
        ),
    ] = None,
    normalise: Normalise = None,
    image_size: ImageSize = None,
    device: Device = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the units in OUT.partial.", rich_help_panel=_RUN)
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard the units in OUT.partial.", rich_help_panel=_RUN)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a packed model.", rich_help_panel=_RUN)
    ] = False,
    cache_gb: Annotated[
        float,
        typer.Option(
            help="Memory for cached activations; beyond it they lie in temporary files.",
            min=0,
            rich_help_panel=_RUN,
            callback=finite,
        ),
    ] = 6.0,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Quantize a SAM into a packed folder."""
    output = Output(json, quiet=quiet)
    data_coco = renamed("--data-coco", data_coco, quiet=quiet, coco=coco, boxes=boxes)
    # From here on, so that importing torch and transformers, which takes seconds, is not silent.
    with Reporter(f"quantizing {model}", quiet=quiet) as reporter:
        from carsam.commands.recipe import quantize_config, require_places
        from carsam.pipeline import quantize as run

        config = quantize_config(
            recipe=recipe,
            method=method,
            bits=bits,
            overrides=bits_for or (),
            settings=set_ or (),
            steps=steps,
            no_mac=no_mac,
            no_jcar=no_jcar,
            granularity=granularity,
            images=str(data) if data is not None else None,
            coco=str(data_coco) if data_coco is not None else None,
            n_images=n_images,
            boxes_per_image=boxes_per_image,
            box_source=box_source,
            seed=seed,
            normalise=normalise,
            image_size=image_size,
            decoder_only=decoder_only,
            budget=budget,
            preset=preset,
        )
        if not config.calibration.images:
            raise ConfigError("calibration images are missing; name their folder with --data.")
        if recipe is not None:
            require_places(config, recipe)
        if out.name in ("", ".."):
            out = out.resolve()  # working files lie beside OUT, under names made from its own
        try:
            result = run(
                model,
                config.calibration.images,
                config,
                out=out,
                device=device,
                resume=resume,
                restart=restart,
                overwrite=overwrite,
                write_results=True,
                cache_gigabytes=cache_gb,
                progress=reporter.run,
            )
        except KeyboardInterrupt as interrupt:
            interrupt.args = (message(interrupt) or INTERRUPTED,)
            raise
        times = reporter.times()
    summarise(result, out, times, output)
    output.save(to_dict(result, out, reporter))


def summarise(result: QuantizeResult, folder: Path, times: Iterable[str], output: Output) -> None:
    """Prints what a quantization gave."""
    from carsam.pack.checkpoint import folder_size

    packed, half = folder_size(folder), float16_bytes(result.model)
    bits = stated_bits(result.recipe["bits"], result.recipe)
    output.line(f"{folder}: {result.recipe['method']} at {bits}")
    output.line(f"  weights  {megabytes(packed)}, {half / packed:.2f} times smaller than FP16's {megabytes(half)}")
    if result.peak_memory:
        output.line(f"  memory   {megabytes(result.peak_memory)} at the peak")
    if result.skipped_images:
        output.line(f"  skipped  {result.skipped_images} calibration images that could not be read")
    output.line("  time")
    for line in times:
        output.line(f"    {line}")


def to_dict(result: QuantizeResult, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """What a quantization gave, for ``--json``."""
    from carsam.pack.checkpoint import folder_size

    return {
        "folder": str(folder),
        "model": result.recipe["model"],
        "method": result.recipe["method"],
        "bits": result.recipe["bits"],
        "decoder_only": result.recipe["decoder_only"],
        "bytes": folder_size(folder),
        "float16_bytes": float16_bytes(result.model),
        "wall_seconds": round(reporter.seconds, 2),
        "stage_seconds": {name: round(seconds, 2) for name, seconds in reporter.run.course.seconds.items()},
        **result.to_dict(),
    }
