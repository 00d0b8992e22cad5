"""The command line, run in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from carsam.cli import app

# Flags for what conftest's QUICK and quick_config say.
QUICK_FLAGS = [
    *("--n-images", "3", "--boxes-per-image", "2", "--steps", "2", "--device", "cpu"),
    *("--set", "mac.solver=pooled", "--set", "mac.value=true"),
    *("--set", "weight_observer=min-max", "--set", "activation_observer=min-max"),
]


@pytest.fixture(scope="session")
def carsam_cli():
    """Runs ``carsam ARGUMENTS``; checks that no traceback is printed and nothing but an exit escapes."""
    runner = CliRunner()

    def run(*arguments: object):
        result = runner.invoke(app, [str(a) for a in arguments], catch_exceptions=False)
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture(scope="session")
def quantize_flags(nano_folder: Path, calibration_folder: Path) -> list[object]:
    """``quantize`` and its arguments, all but ``--out``; a few seconds."""
    data = ["--data", calibration_folder / "images", "--data-coco", calibration_folder / "instances.json"]
    return ["quantize", nano_folder, *data, "--method", "car-sam", *QUICK_FLAGS]


@pytest.fixture(scope="session")
def made(carsam_cli, quantize_flags, tmp_path_factory):
    """A folder that ``carsam quantize`` wrote, and the result of the command; read-only."""
    folder = tmp_path_factory.mktemp("cli") / "nano"
    result = carsam_cli(*quantize_flags, "--out", folder)
    assert result.exit_code == 0, result.output
    return folder, result
