"""JSON and YAML that somebody else wrote: read in a moment, or refused in plain words."""

import math
import time

import pytest

from carsam.errors import ConfigError, DataError
from carsam.reading import MAX_YAML_BYTES, parse_yaml, read_json, read_yaml

# Nine levels of nine aliases each: a billion values.
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [*{a}, *{a}]}}\n" for a, b in zip("abcdefghijklmno", "bcdefghijklmnop")
)


def test_json_keeps_what_is_valid(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5, "\xc3\xa4", null, true], "b": {"c": -3}}')
    assert read_json(path, "get it again") == {"a": [1, 2.5, "ä", None, True], "b": {"c": -3}}


def test_json_numbers_and_characters_beyond_what_can_be_shown(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1e999, "b": -1e999, "c": %s, "d": "x\\u0000\\ud800\\u001b[0m", "\\udfff": 1}' % ("9" * 5000))
    found = read_json(path, "get it again")
    assert found == {"a": math.inf, "b": -math.inf, "c": math.inf, "d": "x\ufffd\ufffd\ufffd[0m", "\ufffd": 1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100 + b"1" + b"}" * 100, "nested too deeply"),
        (b"[]", "holds a list, not a mapping"),
        (b"\xff\xfe{\0}\0", "not text in UTF-8"),
        (b'{"a": ', "not valid JSON"),
        (b"{}" + b" " * 1000, "more than the 0.0 MB that it can need"),
        (None, "cannot read"),
    ],
)
def test_json_that_is_refused(content, words, tmp_path):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_json(path, "get it again", most=1000 if words.startswith("more") else 10**6)
    assert str(path) in str(caught.value)


def test_yaml_keeps_what_is_valid():
    text = "a: {b: [1, 2.5, x]}\nd: 2021-01-02\n1: {<<: {e: 1}, f: 2}\n"
    assert parse_yaml(text, "a.yaml", "fix") == {"a": {"b": [1, 2.5, "x"]}, "d": "2021-01-02", "1": {"e": 1, "f": 2}}
    assert parse_yaml("a: &a [1]\nb: *a\n", "a.yaml", "fix") == {"a": [1], "b": [1]}
    assert parse_yaml("", "a.yaml", "fix") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "aliases counted"),
        (MERGES, "aliases counted"),
        ("&a [*a]", "aliases counted"),
        ("[" * 100_000, "nested too deeply"),
        ("a: " + "9" * 5000, "cannot be read"),
        ("a: 2021-99-99", "cannot be read"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
        ("a: [", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_yaml_that_is_refused(text, words):
    started = time.monotonic()
    with pytest.raises(ConfigError, match=words) as caught:
        parse_yaml(text, "a.yaml", "get it again", error=ConfigError)
    assert "a.yaml" in str(caught.value) and "get it again" in str(caught.value)
    assert time.monotonic() - started < 2


def test_a_large_yaml_file_is_not_read(tmp_path):
    path = tmp_path / "a.yaml"
    with path.open("wb") as file:
        file.truncate(MAX_YAML_BYTES + 1)
    with pytest.raises(DataError, match="more than"):
        read_yaml(path, "get it again")


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"a": {"b": 1, "b": 2}}', "it names 'b' twice"), (f'{{"a": {"9" * 21}}}', "the number 9{20}... is too large")],
)
def test_json_of_settings_is_read_strictly(text, words, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert read_json(path, "get it again")
    with pytest.raises(DataError, match=words):
        read_json(path, "get it again", strict=True)
