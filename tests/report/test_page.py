"""The page: what it says, that it says it safely, and how large it is."""

import json
import math
import re
import shutil
from html import unescape
from html.parser import HTMLParser

import pytest
from packed_example import save_diagnosis, write_all, write_diagnosis, write_packed
from PIL import Image

import carsam
from carsam.commands.common import float16_bytes
from carsam.errors import CarsamError
from carsam.report.page import MAX_BYTES, breakable, render, write_report
from carsam.report.pictures import Pictures
from carsam.report.sections import all_sections
from carsam.report.sections.size import float16_bytes as half_of
from carsam.report.sections.size import region_sizes
from carsam.report.source import read_source


def words(html):
    """The page's text, as it reads."""
    html = re.sub(r"<(style|svg).*?</\1>", " ", html, flags=re.S)
    text = re.sub(r"<wbr>|<[^>]+>", lambda tag: "" if tag[0] == "<wbr>" else " ", html)
    return " ".join(unescape(text).split())


def test_the_page_says_what_matters(full_page):
    text = words(full_page)
    assert "Mean IoU 61.2 , 70.9 in floating point ( −9.7 ; 95 % interval" in text
    assert "times smaller than" in text
    assert "The worst image: worst <image> & more.jpg" in text
    assert "1 of 2 stages got worse" in text
    assert "decoder.layers.0.self_attn.q_proj 1373 4.10 0.00240 0.0168 0.310" in text, "a layer that ACNR changed"
    assert "decoder.layers.0.self_attn.v_proj weights and bias 0.100 0.0660 0.0456 0.123 1.27" in text, "a refit"
    assert "0 tok→img, neighbour 0 img→tok" in full_page
    sections = ["size", "accuracy", "examples", "attention", "oscillation", "units", "network"]
    sections += ["ranges", "sensitivity", "recipe", "commands"]
    assert re.findall(r'<section id="(\w+)"', full_page) == sections
    assert "not known" not in text.split("Size")[0]


def test_summary_without_float_scores_tells_the_diagnosis(full_folder, tmp_path):
    folder = shutil.copytree(full_folder, tmp_path / "packed")
    results = json.loads((folder / "results.json").read_text())
    results["float_evaluation"]["n_prompts"] += 1
    (folder / "results.json").write_text(json.dumps(results))
    text = words(render(read_source(folder)).html)
    # The float model's scores are of other prompts: they are not compared.
    assert "on the 31 prompts of the diagnosis" in text
    assert "so they are not compared" in text and "55.80" not in text


def test_a_bare_folder_says_what_would_tell(bare_folder, bare_page):
    report = render(read_source(bare_folder))
    assert report.missing == (
        *("Accuracy", "Example images", "Attention", "Oscillation", "Reconstruction", "Ranges", "Sensitivity"),
    )
    text = words(bare_page)
    assert "carsam diagnose 'models/sam <b>&amp; co' bare --images IMAGES --coco INSTANCES.json" in text
    assert "carsam evaluate bare --coco INSTANCES.json --images IMAGES" in text
    assert "Its accuracy has not been measured" in text


def test_an_empty_diagnosis(tmp_path):
    folder = write_packed(tmp_path / "packed")
    (folder / "model.safetensors").unlink()
    (folder / "recipe.yaml").unlink()
    save_diagnosis(folder, {"format": 1, "attentions": [], "oscillation": {}, "sites": None})
    report = render(read_source(folder))
    titles = {section.title for section in all_sections(read_source(folder), Pictures(folder))}
    assert set(report.missing) == titles - {"Network map", "Commands"}
    assert "this command makes a new one" in words(report.html)


def rough(value, depth=0):
    """Every number becomes one that is hard to print, and every picture's name one that is not there."""
    if isinstance(value, dict):
        return {key: rough(item, depth + i) for i, (key, item) in enumerate(value.items())}
    if isinstance(value, list):
        return [rough(item, depth + i) for i, item in enumerate(value)]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (None, math.nan, math.inf, -math.inf, 0, -1.0, 1e300, 1e-300)[depth % 8]
    return "../../outside.png" if isinstance(value, str) and value.endswith(".png") else value


def test_any_numbers(full_folder, tmp_path):
    folder = shutil.copytree(full_folder, tmp_path / "packed")
    diagnosis = json.loads((folder / "diagnosis" / "diagnosis.json").read_text())
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(rough(results)))
    for shift in range(3):
        save_diagnosis(folder, {**rough(diagnosis, shift), "format": 1})
        html = render(read_source(folder)).html
        assert "<img" not in html and "The picture is missing or damaged" in html
        assert not re.search(r"\b(nan|inf|None|Undefined)\b", words(html))


def test_any_shapes(full_folder, tmp_path):
    """Keys that are gone, and values of another kind, leave the page standing."""
    folder = shutil.copytree(full_folder, tmp_path / "packed")
    diagnosis = json.loads((folder / "diagnosis" / "diagnosis.json").read_text())
    lists = {key: value for key, value in diagnosis.items() if isinstance(value, list) and value}
    oddities = [
        {key: [{**value[0], **dict.fromkeys(value[0], odd)}] for key, value in lists.items()}
        for odd in ("text", [], {}, [{}], None)
    ]
    oddities += [dict.fromkeys(lists, odd) for odd in ([{}], [None, 3], {"a": 1}, "text")]
    for values in oddities:
        save_diagnosis(folder, {**diagnosis, **values})
        assert render(read_source(folder)).html
    results = json.loads((folder / "results.json").read_text())
    for odd in ("text", 3, [], [{}], {}, {"a": [{}]}, None):
        values = {part: {**dict.fromkeys(results[part], odd), "mean_iou": 1.0} for part in results}
        (folder / "results.json").write_text(json.dumps(values))
        assert render(read_source(folder)).html


def test_hostile_names_are_text(tmp_path):
    evil = '"><script>alert(1)</script><img src=http://evil.example/x.png onerror=alert(1)>'
    folder = write_all(tmp_path / "packed")
    text = (folder / "diagnosis" / "diagnosis.json").read_text()
    for name in ("layers.0", "median <image>"):
        text = text.replace(name, json.dumps(evil)[1:-1])
    save_diagnosis(folder, json.loads(text))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["method"] = config["quantization_config"]["bits"] = evil
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "recipe.yaml").write_text(f"model: '{evil}'\n")
    html = render(read_source(folder)).html
    assert "&lt;script&gt;" in html
    tags = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append((tag, dict(attrs)))

    Parser().feed(html)
    assert all(tag != "script" and not any(name.startswith("on") for name in attrs) for tag, attrs in tags)
    assert all(attrs["src"].startswith("data:") for tag, attrs in tags if tag == "img")


def test_nothing_comes_from_elsewhere(full_page, bare_page):
    for html in (full_page, bare_page):
        for target in re.findall(r"(?:src|href|srcset|action|data)=\"([^\"]*)\"", html):
            assert target.startswith(("data:image/", "#")), target
        assert "url(" not in html and "@import" not in html and "<link" not in html and "<script" not in html
        assert "default-src 'none'" in html


def test_the_same_folder_gives_the_same_page(full_folder, full_page):
    assert render(read_source(full_folder)).html == full_page


def test_pictures_are_embedded_once_and_whole(full_folder, full_page):
    # Ten pairs of heat maps, two examples with three pictures of the image and of each of two objects.
    assert full_page.count('<img src="data:image/') == 38
    pictures = Pictures(full_folder / "diagnosis")
    picture = pictures.get("heat/0-float.png")
    assert pictures.get("heat/0-float.png") is picture and picture.size == (128, 96)
    assert pictures.encode(10**6) == 0 and picture.uri.startswith("data:image/")
    assert pictures.encode(10) == 1 and picture.uri == ""


@pytest.mark.parametrize("name", [None, "", 3, "no.png", "../config.json", "/etc/hostname", "diagnosis.json", "heat"])
def test_what_is_no_picture(name, full_folder):
    assert Pictures(full_folder / "diagnosis").get(name) is None


def test_vit_h_with_large_pictures_stays_small(tmp_path):
    folder = write_all(tmp_path / "packed", n_blocks=32, n_heads=16, n_maps=3, picture_side=64)
    diagnosis = json.loads((folder / "diagnosis" / "diagnosis.json").read_text())
    # Noise, which no format makes small: half a megabyte each.
    maps = []
    for index in range(8):
        names = {"float": f"noise-{index}-float.jpg", "quantized": f"noise-{index}-quantized.jpg"}
        for name in names.values():
            noise = Image.effect_noise((1000, 750), 90).convert("RGB")
            noise.save(folder / "diagnosis" / name, quality=95)
        maps.append({**diagnosis["heat_maps"][0], **names})
    save_diagnosis(folder, {**diagnosis, "heat_maps": maps})
    report = render(read_source(folder))
    size = len(report.html.encode())
    assert 1_000_000 < size < MAX_BYTES
    assert report.left_out == 0 and report.html.count("<img") == 34
    assert report.html.count('class="cell ') == 2 * (32 * 4 + 2 + 32) + 4 * (32 + 7)


def test_pictures_that_no_level_makes_small_enough_are_left_out(full_folder, monkeypatch):
    monkeypatch.setattr("carsam.report.page._PICTURE_BUDGET", 20_000)
    report = render(read_source(full_folder))
    assert 0 < report.left_out < 38
    assert f"{report.left_out} pictures left out to keep the file small" in words(report.html)
    assert "The picture was left out to keep the file small" in words(report.html)


def test_written_whole_or_not_at_all(full_folder, tmp_path, monkeypatch):
    out = tmp_path / "new" / "report.html"
    write_report(full_folder, out)
    first = out.read_text(encoding="utf-8")
    assert first.startswith("<!doctype html>") and first.rstrip().endswith("</html>")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("carsam.output.files.os.replace", fail)
    with pytest.raises(CarsamError, match="No space"):
        write_report(full_folder, out)
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    assert out.read_text(encoding="utf-8") == first


def test_sizes_are_those_of_the_file(packed_folder):
    """On a real packed model."""
    source = read_source(packed_folder)
    regions = {region.title: region for region in region_sizes(source)}
    assert half_of(list(regions.values())) == float16_bytes(carsam.load(packed_folder))
    assert sum(region.bytes for region in regions.values()) < source.weights_bytes
    assert [regions[title].layers for title in ("encoder blocks", "encoder neck", "decoder transformer")] == [32, 2, 32]
    assert "other quantized layers" not in regions


def test_names_may_break():
    assert breakable("a.b_c<d>/e") == "a.<wbr>b_<wbr>c&lt;d&gt;/<wbr>e"


def test_without_ground_truth(tmp_path):
    folder = write_packed(tmp_path / "packed")
    diagnosis = write_diagnosis(folder)
    for example in diagnosis["examples"]:
        for each in (example, *example["zooms"]):
            each["truth"] = None
    save_diagnosis(folder, {**diagnosis, "reference": "float model's masks", "mean_iou_float": 1.0})
    html = render(read_source(folder)).html
    assert html.count("<img") == 32 and "Truth" not in words(html)
    assert "The IoU is measured against the float model's masks, in percent" in words(html)
    # That the float model agrees with itself is no score.
    assert "Mean IoU 61.2 with the float model’s masks, on the 31 prompts of the diagnosis" in words(html)
    assert "100.0" not in words(html)


def test_a_method_that_reconstructs_nothing(tmp_path):
    folder = write_packed(tmp_path / "packed")
    (folder / "results.json").write_text(json.dumps({"quantization": {"seconds": 3.0, "units": []}}))
    report = render(read_source(folder))
    assert "Reconstruction" not in report.missing
    assert "car-sam reconstructed no unit" in words(report.html)
