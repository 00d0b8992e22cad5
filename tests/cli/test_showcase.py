"""A showcase, with two steps a unit and one evaluation image: anew, and going on after an interruption."""

import json

import pytest
from PIL import Image

import carsam
from carsam.commands.progress import RunProgress
from carsam.commands.quickstart import embedded_sample
from carsam.commands.showcase import showcase


def test_a_showcase_and_again(quick_config, tmp_path, capsys):
    sample = embedded_sample()
    stale = tmp_path / "overlays" / "stale.png"
    for _ in range(2):
        rows = showcase(sample, tmp_path, quick_config, limit=1)
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
    assert "Quick start: sam-nano-256" in output.out and "peak memory" in output.out and "unit 14/14" in output.err


def test_an_interrupted_one_goes_on(quick_config, packed_folder, tmp_path, capsys, monkeypatch):
    sample, weights = embedded_sample(), "model.safetensors"
    told = RunProgress.__call__

    def interrupted(self, unit, *position):
        if unit == 3:
            raise KeyboardInterrupt
        told(self, unit, *position)

    with monkeypatch.context() as patch:
        patch.setattr(RunProgress, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
            showcase(sample, tmp_path, quick_config, limit=1, restart=False)
    assert len(list((tmp_path / "quantized.partial").glob("*.safetensors"))) == 3

    rows = showcase(sample, tmp_path, quick_config, limit=1, restart=False)
    assert "1 of 1 images are kept" in capsys.readouterr().err
    assert rows[0].evaluate_seconds is None and rows[1].evaluate_seconds > 0
    assert (tmp_path / "quantized" / weights).read_bytes() == (packed_folder / weights).read_bytes()
    assert not (tmp_path / "quantized.partial").exists()

    again = showcase(sample, tmp_path, quick_config, limit=1, restart=False)
    assert again[1].quantize_seconds == rows[1].quantize_seconds > 0
    assert again[1].mean_iou == rows[1].mean_iou
    noted = json.loads((tmp_path / "quantized" / "results.json").read_text())
    assert noted["quantization"]["seconds"] == rows[1].quantize_seconds and len(noted["quantization"]["units"]) == 14
    assert (tmp_path / "report.html").is_file()
