"""What the documents point at exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_in_code_spans_exist(document):
    text = document.read_text(encoding="utf-8")
    found = re.findall(r"`((?:carsam|tests|tools|benchmarks|docs|recipes|embedded)/[\w./-]+)(?:::[\w.]+)?`", text)
    missing = sorted({path for path in found if not (ROOT / path.rstrip("/")).exists()})
    assert not missing, f"{document.name} names {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tests_that_are_named_exist(document):
    text = document.read_text(encoding="utf-8")
    last = None
    for path, name in re.findall(r"`((?:[\w/]+\.py)|…)::(test_\w+)`", text):
        last = path if path != "…" else last
        file = ROOT / "tests" / last.removeprefix("tests/")
        assert file.is_file(), f"{document.name} names {last}"
        assert f"def {name}(" in file.read_text(encoding="utf-8"), f"{document.name} names {last}::{name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8"))
    assert not [link for link in links if not (document.parent / link).exists()]
