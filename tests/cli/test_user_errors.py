"""Mistakes end in one paragraph that names the mend, exit code 1, and no traceback."""

import json
import shutil

import pytest
import torch

import carsam.pipeline


def fails(result, *words):
    """Checks the exit code and the message."""
    assert result.exit_code == 1, result.output
    message = result.stderr[result.stderr.index("error: ") :]
    assert len(message.strip().splitlines()) == 1
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bits", "w3"], ["'w3'", "w4a4"]),
        (["--bits", "w4a1"], ["1 bits", "8, 16"]),
        (["--method", "foo"], ["'foo'", "adaround, ahcptq, ahcq-sam, brecq, car-sam"]),
        (["--set", "foo=1"], ["'foo'", "granularity"]),
        (["--set", "mac.foo=1"], ["'mac.foo'", "damping"]),
        (["--set", "mac=3"], ["mac", "mapping"]),
        (["--set", "steps"], ["'steps'", "key=value"]),
        (["--set", "granularity=[1"], ["YAML"]),
        (["--set", "reconstruction.steps=many"], ["'reconstruction.steps'", "a whole number", "'many'"]),
        (["--set", "reconstruction.steps=yes"], ["a whole number"]),
        (["--set", "reconstruction.drop=.nan"], ["a number"]),
        (["--set", "mac.solver=magic"], ["'magic'", "pooled"]),
        (["--bits-for", "nowhere=w8a8"], ["'nowhere'", "vision_encoder.layers.0.attn.qkv"]),
        (["--bits-for", "*.neck.*"], ["PATTERN=w8a8"]),
        (["--bits-for", "*.neck.*=8"], ["'8'", "w8a8"]),
        (["--granularity", "atom"], ["'atom'", "module, pair, block, decoder"]),
        (["--no-jcar", "--granularity", "block"], ["contradicts"]),
        (["--n-images", "0"], ["at least 1"]),
        (["--box-source", "magic"], ["auto or grid"]),
        (["--data", "missing-folder"], ["missing-folder"]),
        (["--data-coco", "missing.json"], ["missing.json"]),
        (["--recipe", "missing.yaml"], ["missing.yaml"]),
        (["--device", "abacus"], ["'abacus'", "cpu, cuda"]),
    ],
)
def test_quantize_flags(flags, words, carsam_cli, quantize_flags, tmp_path):
    fails(carsam_cli(*quantize_flags, "--out", tmp_path / "q", *flags), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--no-mac", "--no-jcar", "--steps=3"])
def test_flags_that_the_method_lacks(flag, carsam_cli, nano_folder, calibration_folder, tmp_path):
    arguments = ["quantize", nano_folder, "--data", calibration_folder / "images", "--out", tmp_path / "q"]
    fails(carsam_cli(*arguments, "--method", "rtn", flag), "rtn", flag.split("=")[0], "car-sam")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(carsam_cli, quantize_flags, made, evaluation_folder, tmp_path):
    fails(carsam_cli(*quantize_flags, "--out", tmp_path / "q", "--device", "cuda"), "cuda", "Use cpu or auto")
    image = next((evaluation_folder / "images").iterdir())
    fails(carsam_cli("predict", made[0], image, "--point", "1,1", "--device", "cuda"), "cuda")


def test_output_exists(carsam_cli, quantize_flags, made, tmp_path):
    fails(carsam_cli(*quantize_flags, "--out", made[0]), "exists already", "--overwrite")
    # What is no packed model is never replaced, whatever the flags.
    (tmp_path / "thesis.tex").write_text("years of work")
    fails(carsam_cli(*quantize_flags, "--out", tmp_path, "--overwrite"), "not a packed model")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_data_is_missing(carsam_cli, nano_folder, tmp_path):
    fails(carsam_cli("quantize", nano_folder, "--out", tmp_path / "q"), "--data")
    (tmp_path / "empty").mkdir()
    fails(carsam_cli("quantize", nano_folder, "--data", tmp_path / "empty", "--out", tmp_path / "q"), "no images")


def test_no_such_model(carsam_cli, made, evaluation_folder):
    data = ["--coco", evaluation_folder / "instances.json", "--images", evaluation_folder / "images"]
    fails(carsam_cli("evaluate", "no-such-model", *data), "no-such-model")
    fails(carsam_cli("info", evaluation_folder), "config.json")
    fails(carsam_cli("quantize", made[0], "--data", ".", "--out", "q"), "already quantized")


def test_a_packed_folder_without_config(carsam_cli, made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "damaged")
    (folder / "config.json").unlink()
    fails(carsam_cli("info", folder), "config.json", "get the folder again")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--box or a --point"]),
        (["--box", "1,2,3"], ["x1,y1,x2,y2"]),
        (["--box", "a,b,c,d"], ["x1,y1,x2,y2"]),
        (["--box", "10,10,10,50"], ["no area"]),
        (["--box", "50,50,10,10"], ["no area"]),
        (["--box", "9000,10,9100,50"], ["no area inside the image", "pixels"]),
        (["--point", "1"], ["x,y"]),
        (["--point", "-5,10"], ["outside the image"]),
        (["--point", "5,10,7"], ["label 7"]),
        (["--box", "1,1,50,50", "--box", "2,2,60,60", "--point", "5,5"], ["one object"]),
    ],
)
def test_prompts(flags, words, carsam_cli, made, evaluation_folder, tmp_path):
    image = next((evaluation_folder / "images").iterdir())
    fails(carsam_cli("predict", made[0], image, *flags, "--out", tmp_path / "masks"), *words)
    assert not list(tmp_path.iterdir())


def test_predict_needs_an_image(carsam_cli, made, tmp_path):
    fails(carsam_cli("predict", made[0], tmp_path / "none.jpg", "--box", "1,1,5,5"), "none.jpg")
    fails(carsam_cli("predict", made[0], made[0] / "recipe.yaml", "--box", "1,1,5,5"), "recipe.yaml")


def test_results_cannot_be_written(carsam_cli, made, evaluation_folder, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    image = next((evaluation_folder / "images").iterdir())
    fails(carsam_cli("predict", made[0], image, "--box", "1,1,50,50", "--out", blocked / "masks"), "cannot write")


def test_damaged_recipe(carsam_cli, nano_folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for text, word in (
        ("[1, 2]", "holds no settings"),
        ("a: [", "not valid YAML"),
        ("metod: car-sam", "'metod'"),
        ("settings: 3", "'settings'"),
        ("overrides: {'*': 4}", "'overrides'"),
    ):
        recipe.write_text(text)
        fails(carsam_cli("quantize", nano_folder, "--data", ".", "--out", "q", "--recipe", recipe), word)


def test_usage_errors_exit_with_2(carsam_cli):
    for arguments in (["quantize"], ["nonsense"], ["quantize", "model", "--out", "q", "--steps", "-1"]):
        assert carsam_cli(*arguments).exit_code == 2


def test_interrupt_tells_how_to_go_on(carsam_cli, quantize_flags, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(carsam.pipeline, "quantize", interrupted)
    result = carsam_cli(*quantize_flags, "--out", tmp_path / "q")
    assert result.exit_code == 130
    assert "--resume" in result.stderr


def test_defects_keep_their_traceback(carsam_cli, quantize_flags, tmp_path, monkeypatch):
    def defect(*_, **__):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(carsam.pipeline, "quantize", defect)
    with pytest.raises(ZeroDivisionError):
        carsam_cli(*quantize_flags, "--out", tmp_path / "q")


def test_unreadable_images_are_told(carsam_cli, nano_folder, calibration_folder, tmp_path):
    images = shutil.copytree(calibration_folder / "images", tmp_path / "images")
    for path in sorted(images.iterdir())[2:]:
        path.unlink()
    broken = sorted(images.iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:500])
    result = carsam_cli(
        *("quantize", nano_folder, "--data", images, "--method", "rtn", "--box-source", "grid"),
        *("--set", "weight_observer=min-max", "--set", "activation_observer=min-max", "--out", tmp_path / "q"),
    )
    assert result.exit_code == 0, result.output
    assert f"warning: 1 calibration images skipped: cannot read the image {broken}" in result.stderr
    assert "skipped  1 calibration images" in result.stdout
    assert json.loads((tmp_path / "q" / "results.json").read_text())["quantization"]["skipped_images"] == 1
