"""``carsam compare``: a table of methods, bit-widths and seeds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from carsam.commands.common import METHODS, Device, Normalise, complete_from
from carsam.commands.output import Json, Output, Quiet, check_file, renamed
from carsam.commands.progress import Reporter
from carsam.errors import ConfigError
from carsam.output.files import write_text


def compare(
    recipe: Annotated[
        Path | None,
        typer.Option(help="YAML file of the whole comparison; the options below override it.", show_default=False),
    ] = None,
    model: Annotated[str | None, typer.Option(help="As for carsam quantize.", show_default=False)] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods to compare, by commas: rtn,qdrop,car-sam.",
            show_default=False,
            autocompletion=complete_from(*METHODS),
        ),
    ] = None,
    bits: Annotated[str | None, typer.Option(help="Bit-widths, by commas.", show_default="w4a4")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, by commas.", show_default="0")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of calibration images.", show_default=False)] = None,
    data_coco: Annotated[
        Path | None, typer.Option(help="COCO file whose boxes prompt them.", show_default="the model's own masks")
    ] = None,
    boxes: Annotated[Path | None, typer.Option(hidden=True)] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images to measure on.", show_default=False)] = None,
    coco: Annotated[Path | None, typer.Option(help="COCO file of those images.", show_default=False)] = None,
    out_folder: Annotated[
        Path, typer.Option("--out", help="Work folder; run again with the same one to go on.")
    ] = Path("runs/compare"),
    markdown: Annotated[Path | None, typer.Option(help="Also write the table here.", show_default=False)] = None,
    normalise: Normalise = None,
    device: Device = "auto",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Quantize, pack and measure rows × bits × seeds, and print the table."""
    from carsam.commands.recipe import read_yaml

    output = Output(json, quiet=quiet)
    if markdown is not None:
        check_file(markdown, "--markdown")
    data_coco = renamed("--data-coco", data_coco, quiet=quiet, boxes=boxes)
    values = read_yaml(recipe) if recipe is not None else {}
    calibration = values.get("calibration", {})
    if not isinstance(calibration, dict):
        raise ConfigError(f"'calibration' in the recipe {recipe} must be a mapping.")
    calibration = dict(calibration)
    if data is not None:
        calibration["images"] = str(data)
    if data_coco is not None:
        calibration["coco"] = str(data_coco)
    given = {"model": model, "coco": coco, "images": images, "normalise": normalise}
    values.update({name: str(value) for name, value in given.items() if value is not None})
    values["calibration"] = calibration
    if methods is not None:
        values["rows"] = [{"name": name, "method": name} for name in _split(methods)]
    if bits is not None:
        if not _split(bits):
            raise ConfigError(f"cannot read the bits {bits!r}; write them by commas, as w4a4,w6a6.")
        values["bits"] = _split(bits)
    if seeds is not None:
        if not _split(seeds) or not all(re.fullmatch("[0-9]{1,19}", seed) for seed in _split(seeds)):
            raise ConfigError(f"cannot read the seeds {seeds!r}; write numbers by commas, as 0,1,2.")
        values["seeds"] = [int(seed) for seed in _split(seeds)]
    needed = {"model": "--model", "coco": "--coco", "images": "--images", "rows": "--methods"}
    missing = [option for name, option in needed.items() if name not in values]
    if not calibration.get("images"):
        missing.append("--data")
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given, on the command line or in a --recipe.")

    with Reporter("comparing", quiet=quiet) as reporter:
        from carsam.run.comparison import Comparison
        from carsam.run.comparison import compare as run

        try:
            comparison = Comparison.from_dict(values)
        except ConfigError as error:
            raise error if recipe is None else ConfigError(f"with the recipe {recipe}: {error}") from None
        rows = _Rows(reporter, output, len(comparison.rows) * len(comparison.bits) * len(comparison.seeds))
        result = run(comparison, out_folder, device=device, note=rows.note, progress=reporter.run)
    table = result.to_markdown()
    output.line(table)
    if markdown is not None:
        write_text(markdown, table + "\n")
    output.save(result.to_dict())


class _Rows:
    """Counts the rows of a comparison as they are noted, the float model's first.

    Args:
        reporter: Shows which row is at work.
        output: Takes the lines.
        total: Rows besides the float model's.
    """

    def __init__(self, reporter: Reporter, output: Output, total: int):
        self._reporter, self._output, self._total, self._noted = reporter, output, total, 0

    def note(self, line: str) -> None:
        """A row is finished."""
        self._output.line(line)
        self._noted += 1
        if self._noted <= self._total:
            self._reporter.run.restart(f"row {self._noted}/{self._total}")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
