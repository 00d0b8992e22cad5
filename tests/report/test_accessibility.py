"""What screen readers, keyboards and tired eyes need, as far as the file alone can tell."""

import re
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise

import pytest

VOID = {"meta", "img", "wbr", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements with their ancestors, attributes and text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.stack = [], []
        self.feed(html)
        assert not self.stack, f"not closed: {[e['tag'] for e in self.stack]}"

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "inside": [e["tag"] for e in self.stack], "text": ""}
        element["children"] = []
        if self.stack:
            self.stack[-1]["children"].append(element)
        self.elements.append(element)
        if tag not in VOID:
            self.stack.append(element)

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1]["tag"] == tag, f"</{tag}> closes {self.stack and self.stack[-1]['tag']}"
        self.stack.pop()

    def handle_data(self, data):
        for element in self.stack:
            element["text"] += data

    def all(self, *tags):
        return [e for e in self.elements if e["tag"] in tags]


@pytest.fixture(params=["full_page", "bare_page"])
def page(request):
    """Both pages, parsed."""
    return Page(request.getfixturevalue(request.param))


def test_document(page):
    (html,), (title,) = page.all("html"), [e for e in page.all("title") if "svg" not in e["inside"]]
    assert html["attrs"]["lang"] == "en"
    assert "carsam report" in title["text"] and "\n" not in title["text"]
    names = {e["attrs"].get("name"): e["attrs"].get("content") for e in page.all("meta")}
    assert names["viewport"] == "width=device-width, initial-scale=1"
    assert names["color-scheme"] == "light dark"


def test_landmarks(page):
    for tag in ("header", "nav", "main", "footer"):
        assert len(page.all(tag)) == 1
    assert page.all("nav")[0]["attrs"]["aria-label"]
    ids = {e["attrs"].get("id") for e in page.elements}
    skip = page.all("a")[0]
    assert skip["attrs"]["href"] == "#main" and "Skip" in skip["text"]
    for link in page.all("a"):
        assert link["attrs"]["href"][1:] in ids and link["text"].strip()
    for section in page.all("section"):
        assert section["attrs"]["aria-labelledby"] in ids


def test_headings_do_not_skip(page):
    levels = [int(e["tag"][1]) for e in page.all("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(e["text"].strip() for e in page.all("h1", "h2", "h3"))


def test_ids_are_unique_and_references_lead_somewhere(page):
    ids = [e["attrs"]["id"] for e in page.elements if "id" in e["attrs"]]
    assert len(ids) == len(set(ids))
    for e in page.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert e["attrs"].get(name, ids[0]) in ids


def test_pictures_are_described(page):
    for image in page.all("img"):
        assert len(image["attrs"]["alt"]) > 20
        assert int(image["attrs"]["width"]) > 0 and int(image["attrs"]["height"]) > 0
    for svg in page.all("svg"):
        if "svg" in svg["inside"] or svg["attrs"].get("aria-hidden") == "true":
            continue
        assert svg["attrs"]["role"] == "img"
        assert svg["children"][0]["tag"] == "title" and svg["children"][0]["text"].strip()


def test_tables(page):
    assert page.all("table")
    for table in page.all("table"):
        assert table["children"][0]["tag"] == "caption" and table["children"][0]["text"].strip()
        rows = [row for part in table["children"][1:] for row in part["children"]]
        assert len({len(row["children"]) for row in rows}) == 1, table["children"][0]["text"]
        assert all(sum(cell["tag"] == "th" for cell in row["children"]) == 1 for row in rows[1:])
        assert "div" in table["inside"]
    for head in page.all("th"):
        assert head["attrs"]["scope"] in ("col", "row")


def test_what_scrolls_can_be_reached_and_is_named(page):
    scrolling = [e for e in page.elements if e["attrs"].get("class") == "scroll" or e["tag"] == "pre"]
    assert scrolling
    for element in scrolling:
        assert element["attrs"]["tabindex"] == "0" and element["attrs"]["aria-label"]
    assert all(int(e["attrs"].get("tabindex", 0)) <= 0 for e in page.elements)


def test_disclosures_and_lists(page):
    for details in page.all("details"):
        assert details["children"][0]["tag"] == "summary" and details["children"][0]["text"].strip()
    for group in page.all("ul", "ol"):
        assert {child["tag"] for child in group["children"]} == {"li"}


def test_no_script_and_no_motion(page):
    assert not page.all("script", "iframe", "object", "embed", "link", "base", "form")
    assert not any(name.startswith("on") for e in page.elements for name in e["attrs"])
    css = page.all("style")[0]["text"]
    assert not re.search(r"animation|transition|@keyframes", css)


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def schemes():
    css = (resources.files("carsam.report") / "templates" / "style.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, flags=re.S)[:2]
    found = []
    for block in blocks:
        colors = re.findall(r"--([\w-]+):\s*(#[0-9a-f]{3,6})", block)
        found.append({name: c if len(c) == 7 else "#" + "".join(2 * x for x in c[1:]) for name, c in colors})
    return [pytest.param(colors, id=name) for name, colors in zip(("light", "dark"), found)]


@pytest.mark.parametrize("colors", schemes())
def test_contrast(colors):
    """WCAG 2.2: 4.5 for text, 3 for what charts are drawn with and for the outline of the focus."""
    for paper in ("paper", "raised"):
        for ink in ("ink", "soft", "link"):
            assert contrast(colors[ink], colors[paper]) >= 4.5, (ink, paper)
    drawn = ["float", "quantized", "before", "error", "focus", "strong-line", "cell-line", *(f"m{i}" for i in range(7))]
    for name in drawn:
        assert contrast(colors[name], colors["paper"]) >= 3, name
    for bits in ("b3", "b4", "b6", "b8"):
        assert contrast(colors[bits], colors[f"{bits}-ink"]) >= 4.5, bits
