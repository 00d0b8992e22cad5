"""Where carsam's caches lie."""

from carsam.output.user_cache import CACHE_VARIABLE, cache_folder


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv(CACHE_VARIABLE)
    assert cache_folder().name == "carsam"
