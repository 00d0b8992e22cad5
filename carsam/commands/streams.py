"""Standard streams that take whatever is printed: another encoding, a closed stream, a reader that has gone."""

from __future__ import annotations

import codecs
import io
import sys

# Characters of the tables and messages, for terminals whose encoding lacks them.
_PLAIN = {"×": "x", "±": "+/-", "…": "...", "–": "-", "—": "-", "−": "-", "²": "2", "’": "'", "→": "->", "·": "."}


def _replacement(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    plain = "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text)
    return plain, error.end


def prepare_streams() -> None:
    """Makes stdout and stderr replace what their encoding lacks instead of failing (LANG=C, names not in UTF-8)."""
    codecs.register_error("carsam", _replacement)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="carsam")
