"""``carsam export``."""

import json

import pytest

pytest.importorskip("onnxruntime")


def test_files_are_written_checked_and_described(carsam_cli, made, tmp_path):
    model, _ = made
    out, listed = tmp_path / "files", tmp_path / "export-result.json"
    result = carsam_cli("export", model, "--profile", "samexporter", "--out", out, "--check", "--json", listed)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "nano.decoder.onnx", "nano.encoder.onnx"]
    assert "ONNX Runtime executed 100.0 % of the quantized layers' multiply-accumulates" in result.output
    found = json.loads(listed.read_text())
    assert found["integer_share_of_layers"] == 1 and len(found["proofs"]) == 2
    again = carsam_cli("export", model, "--out", out)
    assert again.exit_code == 1 and "exists already" in again.stderr


def test_mistakes_are_told(carsam_cli, tmp_path):
    unknown = carsam_cli("export", tmp_path / "none", "--profile", "tflite", "--out", tmp_path / "files")
    assert unknown.exit_code == 1 and "there is no export profile 'tflite'" in unknown.stderr
    missing = carsam_cli("export", tmp_path / "none", "--out", tmp_path / "files")
    assert missing.exit_code == 1 and not (tmp_path / "files").exists()
