"""``carsam report``: a packed folder and its diagnosis as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from carsam.commands.common import err, megabytes, out


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What carsam quantize wrote.", show_default=False)],
    out_file: Annotated[
        Path | None, typer.Option("--out", help="HTML file to write.", show_default="DIR/report.html")
    ] = None,
    float_scores: Annotated[
        Path | None,
        typer.Option(
            help="Scores of the float model to compare with, as carsam evaluate FLOAT --json FILE writes them.",
            show_default="those in DIR/results.json, if any",
        ),
    ] = None,
) -> None:
    """Show everything that is known of a packed folder in one HTML file."""
    from carsam.report.page import write_report

    target = out_file if out_file is not None else folder / "report.html"
    made = write_report(folder, target, float_scores)
    out.print(f"{target}  {megabytes(target.stat().st_size)}", markup=False, soft_wrap=True)
    if made.missing:
        err.print(
            f"not known: {', '.join(made.missing)}; the report says what would tell.", markup=False, soft_wrap=True
        )
    if made.left_out:
        err.print(f"{made.left_out} pictures left out to keep the file small.", markup=False, soft_wrap=True)
    if made.refused:
        name, reason = next(iter(made.refused.items()))
        more = f", nor are {len(made.refused) - 1} others" if len(made.refused) > 1 else ""
        err.print(f"warning: the picture {name} is not shown: {reason}{more}.", markup=False, soft_wrap=True)
