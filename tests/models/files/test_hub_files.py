"""The Hub: unreachable within seconds, from the cache where it can be."""

import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

from carsam.data.images.normalisation import UNIT, normalisation_of
from carsam.errors import CheckpointError
from carsam.models.files import hub as hub_files
from carsam.models.load import load_model

WAYS = r"failed: .*pass its folder.*sam_vit_b_01ec64\.pth.*HF_HUB_OFFLINE=1"


@pytest.fixture
def silent_hub(monkeypatch):
    """A server that takes connections and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setattr(hub_files, "_last", None)
    monkeypatch.setattr(hub_files, "PATIENCE", 0.5)
    yield server
    server.close()


@pytest.fixture
def cached(nano_folder, tmp_path, monkeypatch):
    """The embedded model as owner/nano in a cache of its own."""
    cache = tmp_path / "hub"
    model, commit = cache / "models--owner--nano", "a" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    shutil.copytree(nano_folder, model / "snapshots" / commit)
    (model / "snapshots" / commit / "preprocessor_config.json").write_text(
        '{"do_rescale": true, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}'
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return model / "snapshots" / commit


def test_a_hub_that_never_answers_is_one_message_within_seconds(silent_hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"owner/no-such-sam .*(did not answer|timed out)") as caught:
        load_model("owner/no-such-sam")
    assert time.perf_counter() - started < 8  # with the import of the client
    assert all(way in str(caught.value) for way in ("pass its folder", "sam_vit_b_01ec64.pth", "HF_HUB_OFFLINE=1"))


def test_a_name_that_never_resolves_does_not_hang(monkeypatch, tmp_path):
    """Looking up a name has no timeout of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_files, "_last", None)
    monkeypatch.setattr(hub_files, "PATIENCE", 0.3)
    release = threading.Event()
    monkeypatch.setattr(hub_files, "_ask", lambda url, answer: release.wait(20))
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=WAYS):
        load_model("owner/no-such-sam")
    release.set()
    assert time.perf_counter() - started < 2


def test_a_refused_connection_is_said_at_once(silent_hub, monkeypatch, tmp_path):
    silent_hub.close()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=WAYS):
        load_model("owner/no-such-sam")


@pytest.mark.parametrize("offline", [True, False])
def test_a_cached_model_works_by_its_id(silent_hub, cached, monkeypatch, offline):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    model = load_model("owner/nano")
    assert model.config.vision_config.hidden_size == 192
    assert normalisation_of(model) == UNIT


def test_a_cached_model_without_weights_is_named(silent_hub, cached):
    Path(cached / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"owner/nano .*model\.safetensors from the Hugging Face Hub failed"):
        load_model("owner/nano")
