"""Hostile arguments: every command answers with a message and exit code 1 (2 for usage), never with a traceback."""

import subprocess
import sys

import pytest

BIG = "9" * 60
DEEP = "[" * 5000
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)
RECIPES = {
    "laughs": LAUGHS.encode(),
    "itself": b"settings: &a {a: *a}\n",
    "deep": DEEP.encode(),
    "binary": bytes(range(256)) * 4,
    "nul": b"method: 'a\\0b'\n",
    "long integer": b"seed: " + b"9" * 5000 + b"\n",
    "odd tag": b"method: !!int ''\n",
    "code": b"method: !!python/object/apply:os.getcwd []\n",
    "a date": b"calibration: {seed: 2020-02-30}\n",
    "a list": b"- 1\n",
    "keys of other types": b"1: 2\n[a]: 3\n",
    "large": b"#" * 2_000_000,
    "empty": b"",
}
QUANTIZE = [
    ["--bits", "w99a4"],
    ["--bits", "w4"],
    ["--bits", "w" + BIG + "a4"],
    ["--bits", "w\u0664a4"],
    ["--bits-for", "[=w4a4"],
    ["--bits-for", "="],
    ["--set", "mac.solver=" + DEEP],
    ["--set", "=" + "."],
    ["--set", "reconstruction.steps=" + BIG],
    ["--set", "reconstruction.drop=1e999"],
    ["--set", "x" * 10000 + "=1"],
    ["--method", "../rtn"],
    ["--seed", BIG],
    ["--seed", "-1"],
    ["--n-images", "-3"],
    ["--boxes-per-image", BIG],
    ["--steps", BIG],
    ["--cache-gb", "nan"],
    ["--cache-gb", "inf"],
    ["--cache-gb", "-1"],
    ["--device", "cuda:99999999999999999999"],
    ["--device", "meta"],
    ["--device", "cpu:7:7"],
    ["--data", "\U0001f600[/x]\n"],
    ["--data-coco", "."],
    ["--recipe", "."],
    ["--json", "."],
    ["--json", "x" * 5000],
    ["--out", ""],
    ["--data", ""],
    ["--out="],
]
EVALUATE = [
    ["--coco", "."],
    ["--images", "[red]"],
    ["--detections", "."],
    ["--limit", "0"],
    ["--limit", BIG + "x"],
    ["--device", "\n"],
    ["--json", "/dev/null/x"],
    ["--coco", ""],
]
COMPARE = [
    ["--seeds", "0,x"],
    ["--seeds", "\u00b2"],
    ["--seeds", BIG],
    ["--seeds", ","],
    ["--bits", "w4a4,w99a4"],
    ["--bits", ","],
    ["--methods", ","],
    ["--methods", "rtn,none"],
    ["--markdown", "."],
    ["--recipe", "/dev/null"],
    ["--images", ""],
]
DIAGNOSE = [["--images", "."], ["--limit", "0"], ["--boxes-per-image", "nan"], ["--coco", "."], ["--data", ""], []]


def refused(result):
    """Exit code 1 with one paragraph that begins with "error: ", or 2 with the usage."""
    assert result.exit_code in (1, 2), (result.exit_code, result.output[-500:])
    text = result.stderr
    assert ("error: " if result.exit_code == 1 else "Usage: ") in text
    if result.exit_code == 1:
        assert len(text[text.index("error: ") :].strip().splitlines()) == 1
    assert len(text) < 20000


@pytest.mark.parametrize("flags", QUANTIZE, ids=lambda flags: " ".join(flags)[:40])
def test_quantize(flags, carsam_cli, quantize_flags, tmp_path):
    refused(carsam_cli(*quantize_flags, "--out", tmp_path / "q", *flags))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", EVALUATE, ids=lambda flags: " ".join(flags)[:40])
def test_evaluate(flags, carsam_cli, nano_folder, evaluation_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = ["--coco", evaluation_folder / "instances.json", "--images", evaluation_folder / "images"]
    refused(carsam_cli("evaluate", nano_folder, *data, *flags))


@pytest.mark.parametrize("flags", COMPARE, ids=lambda flags: " ".join(flags)[:40])
def test_compare(flags, carsam_cli, nano_folder, evaluation_folder, tmp_path):
    data = ["--coco", evaluation_folder / "instances.json", "--images", evaluation_folder / "images"]
    data += ["--data", evaluation_folder / "images", "--methods", "rtn", "--model", nano_folder]
    refused(carsam_cli("compare", *data, "--out", tmp_path / "work", *flags))


@pytest.mark.parametrize("flags", DIAGNOSE, ids=lambda flags: " ".join(flags)[:40])
def test_diagnose(flags, carsam_cli, nano_folder, packed_folder, tmp_path):
    refused(carsam_cli("diagnose", nano_folder, packed_folder, "--out", tmp_path / "d", *flags))


@pytest.mark.parametrize("command", ["quantize", "compare"])
@pytest.mark.parametrize("kind", RECIPES)
def test_recipes(kind, command, carsam_cli, quantize_flags, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(RECIPES[kind])
    # A method on the command line would win over the recipe's.
    flags = [flag for flag in quantize_flags if flag not in ("--method", "car-sam")]
    positional = flags if command == "quantize" else ["compare"]
    refused(carsam_cli(*positional, "--out", tmp_path / "q", "--recipe", recipe))


@pytest.mark.parametrize("command", ["info", "report", "evaluate", "predict"])
@pytest.mark.parametrize("model", ["", "/dev/null", "\U0001f600 [/x]\n", "x" * 5000, "--", "a/b/c", "~nobody/x"])
def test_models(command, model, carsam_cli, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rest = {"evaluate": ["--coco", "a.json", "--images", "b"], "predict": ["a.png", "--box", "1,1,9,9"]}
    refused(carsam_cli(command, *rest.get(command, []), model))


def test_methods_of_no_name(carsam_cli):
    refused(carsam_cli("methods", "[/x]\U0001f600"))
    refused(carsam_cli("methods", ""))


RUN = "import sys; sys.argv[0] = 'carsam'; from carsam.cli import main; main()"


@pytest.mark.parametrize(
    ("shell", "environment"),
    [
        ('"$@" | head -c 1', {}),
        ('"$@" >&-', {}),
        ('"$@" 2>&-', {}),
        ('"$@"', {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}),
        ('"$@"', {"COLUMNS": "1", "NO_COLOR": "1"}),
        ('"$@"', {"COLUMNS": "many", "TERM": "dumb"}),
    ],
)
@pytest.mark.parametrize("arguments", [["compare", "--help"], ["report", "x\udcff\u00d7"]])
def test_streams(shell, environment, arguments):
    """A reader that has gone, a closed stream, an encoding without ×, no width: never a traceback."""
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", RUN, *arguments]
    variables = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, env=variables)
    output = done.stdout + done.stderr
    assert b"Traceback" not in output and b"Exception ignored" not in output
    if arguments[0] == "report" and "|" not in shell:
        assert done.returncode == 1
