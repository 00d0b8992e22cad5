"""The quick start, with two steps a unit and one evaluation image."""

import json

import pytest
from PIL import Image

import carsam
from carsam.commands import quickstart
from carsam.errors import DataError


def test_quickstart_and_again(quick_config, tmp_path, capsys):
    sample = quickstart.Sample.embedded()
    stale = tmp_path / "overlays" / "stale.png"
    for _ in range(2):
        rows = quickstart.quickstart(sample, tmp_path, quick_config, limit=1)
        assert not stale.exists()
        stale.write_text("of an earlier run")
    assert [row.model for row in rows] == ["float (FP16 file)", "W4A4"]
    assert rows[0].file_bytes > 2.5 * rows[1].file_bytes
    assert [row["mean_iou"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]] == [
        row.mean_iou for row in rows
    ]
    carsam.load(tmp_path / "quantized")
    page = (tmp_path / "report.html").read_text()
    assert f"{rows[0].segm_ap:.1f}" in page and f"{rows[1].segm_ap:.1f}" in page and "data:image" in page
    (overlay,) = [path for path in (tmp_path / "overlays").iterdir() if path != stale]
    assert Image.open(overlay).width > 1000
    output = capsys.readouterr()
    assert "peak memory" in output.out and "unit 14/14" in output.err


def test_the_default_is_car_sam_at_w4a4():
    sample = quickstart.Sample.embedded()
    config = quickstart.default_config(sample)
    assert (config.method, config.bits, config.settings) == ("car-sam", "w4a4", {})


def test_without_the_repository(tmp_path):
    with pytest.raises(DataError, match="repository"):
        quickstart.Sample.embedded(tmp_path)
