"""Folders to report on, and their pages."""

from __future__ import annotations

from pathlib import Path

import pytest
from packed_example import write_all, write_packed

from carsam.report.page import render
from carsam.report.source import read_source


@pytest.fixture(scope="session")
def full_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With results and diagnosis; read-only."""
    return write_all(tmp_path_factory.mktemp("report") / "sam-w4a4")


@pytest.fixture(scope="session")
def bare_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As an interrupted copy might be: neither results nor diagnosis; read-only."""
    return write_packed(tmp_path_factory.mktemp("report") / "bare")


@pytest.fixture(scope="session")
def full_page(full_folder: Path) -> str:
    """The page of ``full_folder``."""
    return render(read_source(full_folder)).html


@pytest.fixture(scope="session")
def bare_page(bare_folder: Path) -> str:
    """The page of ``bare_folder``."""
    return render(read_source(bare_folder)).html
