"""``make quickstart``: the embedded model at W4A4, measured beside its float original, from what the repository holds.

Needs no network and no data of its own. Everything lands in ``runs/quickstart``; see :mod:`carsam.commands.showcase`.
"""

from __future__ import annotations

from pathlib import Path

import typer

from carsam.commands.common import errors_for_people, show_warnings
from carsam.commands.showcase import Sample, showcase
from carsam.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
# Of the 25 embedded calibration images, one has no object of a usable size.
N_IMAGES = 24


def embedded_sample(root: Path = ROOT) -> Sample:
    """The model and images that the repository holds.

    Raises:
        DataError: This carsam was installed without its repository.
    """
    model, images = root / "embedded" / "sam-nano-256", root / "embedded" / "images"
    sample = Sample(
        "Quick start: sam-nano-256 on the embedded evaluation images",
        model,
        images / "calibration",
        images / "evaluation",
    )
    missing = [path for path in (sample.model, sample.calibration, sample.evaluation) if not path.is_dir()]
    if missing:
        raise DataError(f"the quick start needs carsam's repository: there is no {missing[0]}.")
    return sample


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main() -> None:
    """Runs the quick start in the repository that this package lies in."""
    with errors_for_people():
        show_warnings()
        sample = embedded_sample()
        # make has no flag for what an interrupted quick start left, and beginning anew takes minutes.
        showcase(sample, ROOT / "runs" / "quickstart", sample.config(N_IMAGES), restart=True)


if __name__ == "__main__":
    app()
