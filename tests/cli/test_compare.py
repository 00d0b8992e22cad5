"""``carsam compare``."""


def test_compare_prints_and_writes_the_table(carsam_cli, nano_folder, calibration_folder, evaluation_folder, tmp_path):
    data = ["--data", calibration_folder / "images", "--data-coco", calibration_folder / "instances.json"]
    on = ["--coco", evaluation_folder / "instances.json", "--images", evaluation_folder / "images"]
    table = tmp_path / "table.md"
    flags = ["--methods", "rtn", "--bits", "w8a8", "--device", "cpu", "--out", tmp_path / "work", "--markdown", table]
    result = carsam_cli("compare", "--model", nano_folder, *data, *on, *flags)
    assert result.exit_code == 0, result.output
    assert "| W8A8 | rtn |" in result.output and "| W8A8 | rtn |" in table.read_text()
    assert "to float (95 %)" in table.read_text() and "it is noisy, so compare mean IoU" in table.read_text()
    assert table.read_text() == (tmp_path / "work" / "table.md").read_text()


def test_what_is_missing_is_named(carsam_cli, tmp_path):
    result = carsam_cli("compare", "--methods", "rtn", "--out", tmp_path)
    assert result.exit_code == 1
    for option in ("--model", "--coco", "--images", "--data"):
        assert option in result.output
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rows: 3\nmodel: a\ncoco: b\nimages: c\ncalibration: {images: d}\n")
    result = carsam_cli("compare", "--recipe", recipe, "--out", tmp_path)
    assert result.exit_code == 1 and "rows" in result.output
    result = carsam_cli("compare", "--methods", "rtn", "--seeds", "one", "--out", tmp_path)
    assert result.exit_code == 1 and "one" in result.output
