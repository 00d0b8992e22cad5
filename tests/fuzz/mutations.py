"""Damage to files: of their bytes, of the values in their JSON, and of what their headers claim."""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib
from typing import Any

# Stands in a JSON text where json.dumps could not write the number.
_RAW = {"@huge": "1" + 400 * "0", "@digits": 5000 * "9", "@inf": "1e999", "@-inf": "-1e999", "@nan": "NaN"}
_RAW["@deep"] = "[" * 5000 + "]" * 5000
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, -0.0, 1e-320, 1e9, 1e300, 2**31, 2**53 + 1, 2**63, 2**64, 885.0),
    *("", "0", "1", "885", "text", "../../x", "/etc/passwd", "a\0b", "\ud800", "x" * 300, "ä", "\u202e", "1e5"),
    *([], {}, [[]], [{}], [None], {"a": 1}, {"size": [3, 3], "counts": [1]}, [1, 2, 3, 4], [1.5] * 7, ["a"]),
    *_RAW,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value, at any depth."""
    found, waiting = [], [value]
    while waiting:
        at = waiting.pop()
        keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
        for key in keys:
            found.append((at, key))
            waiting.append(at[key])
    return found


def mutate_json(rng: random.Random, value: Any, times: int | None = None) -> Any:
    """A copy with one to three values changed, removed, repeated, moved or replaced by odd ones."""
    value = {"": copy.deepcopy(value)}
    for _ in range(times or rng.choice((1, 1, 1, 2, 3))):
        found = places(value)
        # Many of the values are coordinates: those near the root get their share.
        depth = rng.choice((None, None, 60))
        container, key = rng.choice(found[:depth])
        _change(rng, container, key, found)
    return value.get("")


def _change(rng: random.Random, container: Any, key: Any, found: list[tuple[Any, Any]]) -> None:
    old = container[key]
    action = rng.randrange(12)
    if rng.random() < 0.4 and isinstance(old, (int, float)) and not isinstance(old, bool):
        # Small steps: what is still valid reaches the code after the checks.
        container[key] = rng.choice((old + 1, old - 1, float(old), old * 1.1, old + 0.5, abs(old)))
    elif action == 0 and key != "":
        del container[key]
    elif action == 1 and isinstance(container, list):
        container.insert(rng.randrange(len(container) + 1), copy.deepcopy(old))
    elif action == 2:
        other, name = rng.choice(found)
        container[key] = copy.deepcopy(other[name])
    elif action == 3:
        container[key] = str(old) if not isinstance(old, (dict, list)) else list(old)
    elif action == 4 and isinstance(old, (int, float)):
        container[key] = rng.choice((-old, float(old), old * 1e9, old / 1e9, int(old) + 1, [old], {"x": old}))
    elif action == 5 and isinstance(container, dict):
        container[rng.choice(("x", "id", "size", key + "s", ""))] = container.pop(key) if key else old
    elif action == 6:
        for _ in range(rng.choice((1, 3, 100))):
            old = [old]
        container[key] = old if rng.random() < 0.5 else "@" + str(rng.choice(("huge", "nan")))
    elif action == 7 and isinstance(old, list):
        rng.shuffle(old)
    elif action == 8 and isinstance(old, list):
        container[key] = old[: rng.randrange(len(old) + 1)]
    elif action == 9 and isinstance(old, list) and len(old) < 1000:
        container[key] = old * rng.choice((2, 10, 50))
    else:
        container[key] = copy.deepcopy(rng.choice(ODD))


def json_text(value: Any) -> str:
    """JSON with the numbers that Python's own writer has no form for."""
    text = json.dumps(value)
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text


def json_bytes(rng: random.Random, value: Any) -> bytes:
    """JSON in some encoding, now and then cut or damaged."""
    text = json_text(value)
    action = rng.randrange(20)
    if action == 0:
        return text.encode("utf-16", "surrogatepass")
    if action == 1:
        return b"\xef\xbb\xbf" + text.encode("utf-8", "surrogatepass")
    if action == 2:
        return mutate_bytes(rng, text.encode("utf-8", "surrogatepass"))
    return text.encode("utf-8", "surrogatepass")


def mutate_bytes(rng: random.Random, data: bytes, *, near: int | None = None) -> bytes:
    """Bytes flipped, removed, inserted, repeated or cut off.

    Args:
        rng: Decides.
        data: The bytes.
        near: Change the first so many bytes only, where headers are.
    """
    if not data:
        return rng.randbytes(8)
    reach = min(near or len(data), len(data))
    changed = bytearray(data)
    action = rng.randrange(7)
    if action <= 2:
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            changed[rng.randrange(reach)] = rng.choice((0, 255, rng.randrange(256), 127))
    elif action == 3:
        del changed[rng.randrange(len(changed)) :]
    elif action == 4:
        start = rng.randrange(reach)
        del changed[start : start + rng.choice((1, 4, 100))]
    elif action == 5:
        start = rng.randrange(reach)
        changed[start:start] = rng.choice((rng.randbytes(4), bytes(64), changed[start : start + 50]))
    else:
        start = rng.randrange(max(1, reach - 3))
        changed[start : start + 4] = struct.pack(
            rng.choice("<>") + "I", rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 65536))
        )
    return bytes(changed)


def png(width: int, height: int, depth: int, color: int, data: bytes) -> bytes:
    """A PNG that claims a size, with valid checksums, whatever its data are."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
