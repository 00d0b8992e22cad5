"""The page in a real browser: headless Chromium, where there is one (Debian's package chromium, or CARSAM_CHROMIUM)."""

import html as html_module
import json
import os
import re
import shutil
import subprocess

import pytest
from PIL import Image

CHROMIUM = os.environ.get("CARSAM_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: install the package chromium, or name one in CARSAM_CHROMIUM"
)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--allow-file-access-from-files", "--disable-dev-shm-usage", "--force-device-scale-factor=1"),
]
# Blink's numbers for prefers-color-scheme.
SCHEMES = {"dark": 0, "light": 1}
PAPER = {"light": (0xFC, 0xFC, 0xFA), "dark": (0x14, 0x17, 0x1A)}
WIDTHS = (360, 768, 1280)

# A window of headless Chromium is never narrower than about 500 pixels; a frame is as narrow as one likes.
WRAPPER = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<style>body { margin: 0 } iframe { border: 0; display: block }</style>
%s
<pre id="found"></pre>
<script>
function measure(frame) {
  const page = frame.contentDocument, window_ = frame.contentWindow, root = page.documentElement;
  const overflow = () => [...page.querySelectorAll("body *")].filter(e => {
    if (e.closest(".scroll, pre, .skip") && !e.matches(".scroll, pre")) return false;
    const box = e.getBoundingClientRect();
    return box.width && (box.right > root.clientWidth + 0.5 || box.left < -0.5);
  }).slice(0, 5).map(e => e.tagName + "." + e.getAttribute("class") + " " + (e.textContent || "").slice(0, 40));
  const closed = {scrollWidth: root.scrollWidth, overflow: overflow()};
  page.querySelectorAll("details").forEach(e => e.open = true);
  const images = [...page.images];
  return {
    width: root.clientWidth, closed, open: {scrollWidth: root.scrollWidth, overflow: overflow()},
    images: images.length, broken: images.filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.alt),
    dark: window_.matchMedia("(prefers-color-scheme: dark)").matches,
    paper: window_.getComputedStyle(page.body).backgroundColor,
    smallest: Math.min(...[...page.querySelectorAll("svg text")].map(e => e.getBoundingClientRect().height)),
    requests: window_.performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
  };
}
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(measure);
  document.getElementById("found").textContent = JSON.stringify(found);
};
</script>"""


def chromium(folder, *arguments):
    """Runs Chromium with an empty profile; its standard output, and what the page wrote to the console."""
    profile = folder / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module", params=["full_page", "bare_page"])
def measured(request, tmp_path_factory):
    """By scheme: measurements at every width, and the console."""
    folder = tmp_path_factory.mktemp("browser")
    (folder / "report.html").write_text(request.getfixturevalue(request.param), encoding="utf-8")
    frames = "".join(f'<iframe src="report.html" width="{width}" height="900"></iframe>' for width in WIDTHS)
    (folder / "wrapper.html").write_text(WRAPPER % frames, encoding="utf-8")
    found = {}
    for scheme, number in SCHEMES.items():
        flags = ["--window-size=1400,1000", f"--blink-settings=preferredColorScheme={number}", "--dump-dom"]
        dom, console = chromium(folder, *flags, (folder / "wrapper.html").as_uri())
        values = json.loads(html_module.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.S)[1]))
        found[scheme] = values, console
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_fits_loads_and_is_quiet(measured, scheme):
    values, console = measured[scheme]
    assert console == []
    assert [value["width"] for value in values] == list(WIDTHS)
    for value in values:
        for state in ("closed", "open"):
            assert value[state] == {"scrollWidth": value["width"], "overflow": []}, (value["width"], state)
        assert value["broken"] == [] and value["requests"] == []
        assert value["dark"] == (scheme == "dark")
        assert value["paper"] == "rgb({}, {}, {})".format(*PAPER[scheme])
        # Text in charts keeps its size on a phone.
        assert value["smallest"] >= 12


def test_every_picture_is_there(measured, request):
    expected = 38 if "full_page" in request.node.name else 0
    assert {value["images"] for values, _ in measured.values() for value in values} == {expected}


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (360, "light")])
def test_screenshots(full_page, width, scheme, tmp_path):
    """Something is drawn, on the paper of the scheme, with a margin at both sides."""
    (tmp_path / "report.html").write_text(full_page, encoding="utf-8")
    frame = (
        f'<style>body {{ margin: 0 }} iframe {{ border: 0 }}</style><iframe src="report.html" width={width} height=900>'
    )
    (tmp_path / "wrapper.html").write_text(f"<!doctype html>{frame}</iframe>", encoding="utf-8")
    flags = [f"--window-size={max(width, 600)},900", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"]
    shot = tmp_path / "shot.png"
    chromium(tmp_path, *flags, f"--screenshot={shot}", (tmp_path / "wrapper.html").as_uri())
    with Image.open(shot) as image:
        picture = image.convert("RGB").crop((0, 0, width, 900))
    for x in (3, width - 4):
        assert {picture.getpixel((x, y)) for y in range(0, 900, 9)} == {PAPER[scheme]}
    assert len(picture.getcolors(2**24)) > 50


def test_it_prints(full_page, tmp_path):
    (tmp_path / "report.html").write_text(full_page, encoding="utf-8")
    pdf = tmp_path / "report.pdf"
    chromium(tmp_path, f"--print-to-pdf={pdf}", "--no-pdf-header-footer", (tmp_path / "report.html").as_uri())
    assert pdf.read_bytes().startswith(b"%PDF") and pdf.stat().st_size > 50_000
