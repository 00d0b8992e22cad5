"""Interrupted runs: what is kept, what continues, what is refused, what is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import carsam
from carsam.errors import CarsamError
from carsam.output.files import SPILL, clear_spills, whole_file
from carsam.output.partial import MANIFEST
from carsam.output.signals import interrupts, message
from carsam.run.progress import KEPT


class Stop(Exception):
    pass


def quantize(model, config, **options):
    return carsam.quantize(model, config.calibration.images, config, **options)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def interrupted(nano_folder, quick_config, tmp_path_factory) -> Path:
    """The folder of a run that ended at its third unit; read-only."""

    def stop(unit, *_):
        if unit == 2:
            raise Stop

    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Stop):
        quantize(nano_folder, quick_config, out=folder / "m", progress=stop)
    return folder


@pytest.fixture
def out(interrupted, tmp_path) -> Path:
    """An output beside which units of an interrupted run lie."""
    return Path(shutil.copytree(interrupted, tmp_path / "work")) / "m"


def test_units_are_kept_until_the_user_says_what_to_do(out, nano_folder, quick_config):
    with pytest.raises(CarsamError, match=r"2 of 14 units are finished.*--resume.*--restart"):
        quantize("no-such-model", quick_config, out=out)
    assert len(list(out.with_name("m.partial").glob("*.safetensors"))) == 2
    with pytest.raises(CarsamError, match="exclude"):
        quantize(nano_folder, quick_config, out=out, resume=True, restart=True)


def test_another_run_names_what_differs_before_it_computes(out, nano_folder, quick_config):
    def never(*_):
        raise AssertionError("computed")

    settings = {**quick_config.settings, "mac": {"solver": "pooled", "value": False}}
    calibration = replace(quick_config.calibration, n_images=2)
    for change, word in (
        ({"bits": "w6a6"}, r"bits \(w4a4 there, w6a6 here\)"),
        ({"settings": settings}, r"setting mac\.value \(true there, false here\)"),
        ({"calibration": calibration}, "the calibration data"),
    ):
        with pytest.raises(CarsamError, match=word):
            quantize(nano_folder, replace(quick_config, **change), out=out, resume=True, progress=never)
    manifest = out.with_name("m.partial") / MANIFEST
    noted = json.loads(manifest.read_text())
    noted["ingredients"].update({"torch": "1.0", "threads": 77})
    manifest.write_text(json.dumps(noted))
    with pytest.raises(CarsamError, match=r"threads \(77 there.*torch \(1\.0 there"):
        quantize(nano_folder, quick_config, out=out, resume=True, progress=never)


def test_kept_units_are_shown_and_damaged_ones_computed_again(out, nano_folder, quick_config, packed_folder, caplog):
    _, second = sorted(out.with_name("m.partial").glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    content = bytearray(second.read_bytes())
    content[-7] ^= 1  # one bit of a tensor
    second.write_bytes(content)
    names, stages = [], []

    def progress(_unit, _n, name, _step, _steps):
        names.append(name)

    progress.stage = lambda name, _done, _total: stages.append(name)
    result = quantize(nano_folder, quick_config, out=out, resume=True, progress=progress)
    assert [name for name in dict.fromkeys(names) if name.endswith(KEPT)] == [names[0]]
    assert "is damaged" in caplog.text and str(second) in caplog.text
    assert weights(out) == weights(packed_folder)
    assert [path.name for path in out.parent.iterdir()] == ["m"]
    order = ["preparing", "proposals", "weight grids", "units", "packing", "verifying"]
    assert list(dict.fromkeys(stages)) == list(result.stages) == order
    assert sum(result.stages.values()) <= result.seconds


def test_a_whole_folder_needs_nothing_more(out, packed_folder, nano_folder, quick_config):
    """A run that was killed after the move is finished by --resume; another run's folder is not taken for it."""
    shutil.copytree(packed_folder, out)
    with pytest.raises(CarsamError, match=r"something else \(bits\)"):
        quantize(nano_folder, replace(quick_config, bits="w6a6"), out=out, resume=True)
    other = shutil.copytree(nano_folder, out.parent.parent / "other-model")
    with pytest.raises(CarsamError, match=r"something else \(model\)"):
        quantize(other, quick_config, out=out, resume=True)
    quantize(nano_folder, quick_config, out=out, resume=True)
    assert weights(out) == weights(packed_folder)
    assert [path.name for path in out.parent.iterdir()] == ["m"]


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"restart": True}])
def test_a_users_folder_of_that_name_stays(options, quick_config, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo").write_text("mine")
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "n.partial").symlink_to(tmp_path / "mine")
    for name in ("m", "n"):
        with pytest.raises(CarsamError, match="did not make it"):
            quantize("no-such-model", quick_config, out=tmp_path / name, **options)
    assert (tmp_path / "n.partial" / "photo").read_text() == "mine" and (tmp_path / "m.partial").is_dir()


RUN = """
import os, signal, sys
import carsam.pipeline
from carsam.cli import main
quantize = carsam.pipeline.quantize

def watched(*arguments, **options):
    def progress(unit, *_):
        if unit == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    return quantize(*arguments, **{**options, "progress": progress})

carsam.pipeline.quantize = watched
sys.argv = ["carsam", *sys.argv[1:]]
main()
"""


def test_sigterm_ends_as_an_interrupt(nano_folder, calibration_folder, tmp_path):
    data = ["--data", calibration_folder / "images", "--boxes", calibration_folder / "instances.json"]
    flags = ["--n-images", 2, "--boxes-per-image", 2, "--steps", 1, "--device", "cpu", "--method", "car-sam"]
    flags += ["--set", "weight_observer=min-max", "--set", "activation_observer=min-max", "--cache-gb", 0]
    command = [sys.executable, "-c", RUN, "quantize", nano_folder, *data, *flags, "--out", tmp_path / "m"]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 143, done.stderr
    assert "2 of 14 units are finished and kept" in done.stderr and "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"m.partial", "tmp"}
    assert not list(temporary.glob(f"{SPILL}*"))


@pytest.fixture
def not_ignored():
    """Ctrl-C reaches the tests also where they run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_lets_the_cleaning_end(capfd, not_ignored):
    with pytest.raises(KeyboardInterrupt) as caught, interrupts():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
    assert "stopping" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    first, second = KeyboardInterrupt("7 units are kept"), KeyboardInterrupt()
    second.__context__ = first
    assert message(second) == "7 units are kept" and message(caught.value) == ""


def test_leftovers_of_dead_processes_go_and_those_of_live_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead, alive = tmp_path / f"{SPILL}4194303-ab", tmp_path / f"{SPILL}{os.getpid()}-cd"
    for folder in (dead, alive):
        folder.mkdir()
    (tmp_path / ".carsam-a.json.4194303.tmp").write_text("half")
    clear_spills()
    with whole_file(tmp_path / "b.json") as temporary:
        temporary.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {alive.name, "b.json"}
