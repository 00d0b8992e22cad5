"""The commands of the page: quoted, and such as carsam takes."""

import json
import re
import shlex
import shutil
from html import unescape

import typer

from carsam.cli import app
from carsam.report.commands import quoted, stored
from carsam.report.page import render
from carsam.report.source import read_source


def commands(html):
    blocks = re.findall(r'<pre class="command"[^>]*>(.*?)</pre>', html, flags=re.S)
    return [shlex.split(line) for block in blocks for line in unescape(block).splitlines()]


def test_carsam_takes_every_command(full_page, bare_page):
    """Each is parsed as the command line parses it; what it names need not exist."""
    known = typer.main.get_command(app).commands
    seen = set()
    for program, name, *arguments in commands(full_page) + commands(bare_page):
        assert program == "carsam"
        known[name].make_context(name, arguments, resilient_parsing=True)
        parser = known[name].make_parser(known[name].make_context(name, [], resilient_parsing=True))
        parser.parse_args(list(arguments))  # raises at an option that there is not
        seen.add(name)
    assert seen == {"quantize", "evaluate", "diagnose", "report"}


def test_names_are_quoted(full_folder, tmp_path):
    folder = shutil.copytree(full_folder, tmp_path / "-my model; rm -rf 'x'")
    results = json.loads((folder / "results.json").read_text())
    results["evaluation"] |= {"coco": "data/$(id).json", "images": "/home/me/val", "boxes": "C:\\det.json", "limit": 7}
    (folder / "results.json").write_text(json.dumps(results))
    found = commands(render(read_source(folder)).html)
    name = "./-my model; rm -rf 'x'"
    evaluate = next(words for words in found if words[1] == "evaluate" and words[2] == name)
    # Places on somebody's machine are left to the reader.
    data = ["--coco", "data/$(id).json", "--images", "IMAGES", "--detections", "DETECTIONS.json", "--limit", "7"]
    assert evaluate == ["carsam", "evaluate", name, *data]
    assert ["carsam", "report", name, "--float-scores", "FLOAT.json"] in found
    quantize = next(words for words in found if words[1] == "quantize")
    assert quantize[2:5] == ["models/sam <b>&amp; co", "--recipe", f"{name}/recipe.yaml"]


def test_stored():
    assert stored("a/b.json", "FILE") == "a/b.json"
    assert stored("a/b c", "FILE") == "'a/b c'"
    for value in (None, "", "instances.json", 3, "/a", "~/a", "C:\\a", "a\nb", "x" * 999 + "…"):
        assert stored(value, "FILE") == "FILE"
    assert quoted("-x") == "./-x"
