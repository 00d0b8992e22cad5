"""``carsam compare``: a table of methods, bit-widths and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from carsam.commands.common import Device, out
from carsam.commands.progress import Reporter
from carsam.files import write_text


def compare(
    recipe: Annotated[
        Path | None,
        typer.Option(help="YAML file of the whole comparison; the options below override it.", show_default=False),
    ] = None,
    model: Annotated[str | None, typer.Option(help="As for carsam quantize.", show_default=False)] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods to compare, by commas: rtn,qdrop,car-sam.", show_default=False)
    ] = None,
    bits: Annotated[str | None, typer.Option(help="Bit-widths, by commas.", show_default="w4a4")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, by commas.", show_default="0")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of calibration images.", show_default=False)] = None,
    boxes: Annotated[
        Path | None, typer.Option(help="COCO file whose boxes prompt them.", show_default="the model's own masks")
    ] = None,
    coco: Annotated[Path | None, typer.Option(help="COCO file to measure on.", show_default=False)] = None,
    images: Annotated[Path | None, typer.Option(help="Its image folder.", show_default=False)] = None,
    out_folder: Annotated[
        Path, typer.Option("--out", help="Work folder; run again with the same one to go on.")
    ] = Path("runs/compare"),
    markdown: Annotated[Path | None, typer.Option(help="Also write the table here.", show_default=False)] = None,
    device: Device = "auto",
) -> None:
    """Quantize, pack and measure rows × bits × seeds, and print the table."""
    from carsam.commands.recipe import read_yaml
    from carsam.errors import ConfigError
    from carsam.evaluate.comparison import Comparison
    from carsam.evaluate.comparison import compare as run

    values = read_yaml(recipe) if recipe is not None else {}
    calibration = dict(values.get("calibration", {}))
    if data is not None:
        calibration["images"] = str(data)
    if boxes is not None:
        calibration["coco"] = str(boxes)
    given = {"model": model, "coco": coco, "images": images}
    values.update({name: str(value) for name, value in given.items() if value is not None})
    values["calibration"] = calibration
    if methods is not None:
        values["rows"] = [{"name": name, "method": name} for name in _split(methods)]
    if bits is not None:
        values["bits"] = _split(bits)
    if seeds is not None:
        if not all(seed.isdigit() for seed in _split(seeds)):
            raise ConfigError(f"cannot read the seeds {seeds!r}; write numbers by commas, as 0,1,2.")
        values["seeds"] = [int(seed) for seed in _split(seeds)]
    needed = {"model": "--model", "coco": "--coco", "images": "--images", "rows": "--methods"}
    missing = [option for name, option in needed.items() if name not in values]
    if not calibration.get("images"):
        missing.append("--data")
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given, on the command line or in a --recipe.")

    with Reporter("comparing") as reporter:
        result = run(Comparison.from_dict(values), out_folder, device=device, note=out.print, progress=reporter.units)
    table = result.to_markdown()
    out.print(table, markup=False, soft_wrap=True)
    if markdown is not None:
        write_text(markdown, table + "\n")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
