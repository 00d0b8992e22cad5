"""One name for one thing: every option of every command is in one table, and means the same wherever it stands."""

import inspect

import pytest
import typer.main

import carsam.commands.common as common
from carsam.cli import COMMANDS, app
from carsam.methods.base import registry

# Options that several commands share, and which commands have them.
SHARED = {
    "--data": {"quantize", "compare", "benchmark"},
    "--data-coco": {"quantize", "compare"},
    "--images": {"evaluate", "compare", "diagnose", "benchmark"},
    "--coco": {"evaluate", "compare", "diagnose", "benchmark"},
    "--detections": {"evaluate"},
    "--limit": {"evaluate", "diagnose", "benchmark"},
    "--boxes-per-image": {"quantize", "diagnose"},
    "--bits": {"quantize", "compare"},
    "--recipe": {"quantize", "compare"},
    "--out": {"quantize", "evaluate", "predict", "compare", "diagnose", "report", "export"},
    "--overwrite": {"quantize", "evaluate", "predict", "export"},
    "--video": {"evaluate", "predict"},
    "--device": {"quantize", "evaluate", "predict", "compare", "diagnose"},
    "--runtime": {"evaluate", "predict"},
    "--json": {"quantize", "evaluate", "predict", "compare", "diagnose", "info", "export", "benchmark"},
    "--quiet": {"quantize", "evaluate", "predict", "compare", "diagnose", "info", "export", "benchmark"},
    "--normalise": {"quantize", "evaluate", "predict", "compare", "diagnose", "export"},
    "--image-size": {"quantize", "evaluate", "predict", "export", "benchmark"},
    "--seed": {"quantize"},
    "--seeds": {"compare"},
    "--restart": {"quantize", "evaluate"},
}
# Old names, for one version: hidden, and what to say instead.
OLD = {
    "quantize": {"--coco": "--data-coco", "--boxes": "--data-coco"},
    "evaluate": {"--boxes": "--detections"},
    "compare": {"--boxes": "--data-coco"},
    "diagnose": {"--data": "--images", "--images-limit": "--limit", "--prompts": "--boxes-per-image"},
}


def options():
    """``(command, option, hidden)`` of all commands."""
    group = typer.main.get_command(app)
    for name in COMMANDS:
        for parameter in group.commands[name].params:
            for option in parameter.opts:
                if option.startswith("--"):
                    yield name, option, getattr(parameter, "hidden", False)


def test_shared_options_have_one_name():
    having = {}
    for command, option, hidden in options():
        if not hidden:
            having.setdefault(option, set()).add(command)
    assert {option: having[option] for option in SHARED} == SHARED
    several = {option for option, commands in having.items() if len(commands) > 1}
    assert several <= set(SHARED), "an option of several commands belongs in the table"


def test_old_names_are_hidden():
    hidden = {}
    for command, option, is_hidden in options():
        if is_hidden:
            hidden.setdefault(command, set()).add(option)
    assert hidden == {command: set(names) for command, names in OLD.items()}


@pytest.mark.parametrize("command", OLD)
def test_old_names_work_with_a_note(command, carsam_cli, tmp_path):
    positional = {"quantize": ["none"], "evaluate": ["none"], "compare": [], "diagnose": ["none", "none"]}[command]
    needed = {"quantize": ["--out", tmp_path / "q"], "evaluate": ["--coco", "c.json", "--images", "i"]}.get(command, [])
    for old, new in OLD[command].items():
        result = carsam_cli(command, *positional, *needed, old, 3)
        assert result.exit_code == 1
        assert f"note: {old} is now {new}; the old name works in this version only." in result.stderr
        result = carsam_cli(command, *positional, *needed, old, 3, new, 3)
        assert result.exit_code == 1
        assert f"{old} is the old name of {new}; give only {new}." in result.stderr


def test_help_says_the_same_of_shared_options():
    group = typer.main.get_command(app)
    for option in ("--device", "--json", "--quiet"):
        texts = {p.help for name in COMMANDS for p in group.commands[name].params if option in p.opts}
        assert len(texts) == 1, texts


def test_completed_methods_are_all_methods():
    assert sorted(registry()) == sorted(common.METHODS)
    assert list(inspect.signature(common.complete_from("a")).parameters) == ["incomplete"]
    assert common.complete_from("auto", "cpu", "cuda")("c") == ["cpu", "cuda"]
