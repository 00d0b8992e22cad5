"""Numbers as the report prints them; what is missing, NaN or infinite has a form of its own."""

from __future__ import annotations

import math
from typing import Any

from carsam.commands import common

MISSING = "–"
# From here on a number of bytes, seconds or percent is written with its power of ten.
_LARGEST = 1e15


def finite(value: Any) -> float | None:
    """A finite number as float; None for anything else that JSON can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond a float
        return None


def number(value: Any, digits: int = 3) -> str:
    """``0.0123``, ``12.3``, ``1.23e-5``, ``−4.5``; ``–`` where there is none, ``∞`` where it is infinite."""
    if isinstance(value, float) and math.isinf(value):
        return "∞" if value > 0 else "−∞"
    value = finite(value)
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 < exponent < 6:
        text = f"{abs(value):.{max(0, digits - 1 - exponent)}f}"
    else:
        mantissa, _, power = f"{abs(value):.{digits - 1}e}".partition("e")
        text = f"{mantissa}e{int(power)}"
    return f"−{text}" if value < 0 else text


def whole(value: Any) -> str:
    """A number that is mostly a whole one (bits, modes, pixels): ``4``, and ``4.5`` where it is not."""
    known = finite(value)
    return number(value) if known is None or not known.is_integer() or abs(known) >= 1e6 else decimal(known, 0)


def box(sides: Any) -> str:
    """A box in pixels: ``402, 62, 512, 337.5``."""
    known = [finite(side) for side in sides] if isinstance(sides, list) else []
    return ", ".join(MISSING if side is None else whole(round(side, 1)) for side in known)


def decimal(value: Any, places: int = 1) -> str:
    """With a fixed number of places: ``47.4``."""
    value = finite(value)
    if value is None:
        return MISSING
    if abs(value) >= _LARGEST:
        return number(value)
    text = f"{abs(value):.{places}f}"
    return f"−{text}" if value < 0 and float(text) else text


def signed(value: Any, places: int = 1) -> str:
    """A difference, with its sign: ``+1.2``, ``−16.4``, ``0.0``."""
    text = decimal(value, places)
    return f"+{text}" if text[0].isdigit() and float(text) else text


def percent(share: Any, places: int = 1) -> str:
    """A share 0..1 as ``12.3 %``; a share too small for its places says so instead of looking like none."""
    value = finite(share)
    if value is None:
        return MISSING
    if 0 < value < 0.5 * 10 ** -(places + 2):
        return _together(f"< {10**-places:.{places}f} %")
    return _together(f"{decimal(100 * value, places)} %")


def count(value: Any) -> str:
    """A whole number in groups of three: ``4 058 340``."""
    value = finite(value)
    if value is None or abs(value) >= _LARGEST:
        return number(value)
    return f"{round(value):,}".replace(",", "\u202f")


def plural(amount: Any, noun: str) -> str:
    """``1 image``, ``3 images``."""
    return _together(f"{count(amount)} ") + (noun if amount == 1 else f"{noun}s")


def size(amount: Any) -> str:
    """``3.1 MB``, ``1.25 GB``."""
    value = finite(amount)
    if value is None or abs(value) >= _LARGEST:
        return number(value)
    return _together(common.megabytes(round(value)))


def duration(seconds: Any) -> str:
    """``41.3 s``, ``3 min 12 s``, ``2 h 5 min``."""
    value = finite(seconds)
    if value is None or abs(value) >= _LARGEST:
        return number(value)
    return _together(common.duration(value))


def _together(text: str) -> str:
    """With spaces at which no line breaks."""
    return text.replace(" ", "\u00a0")
