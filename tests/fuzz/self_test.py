"""What the harness itself must notice, whatever carsam does; needs neither torch nor a model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from carsam.errors import CarsamError

PREFIX = "self-test: "


def self_test(name: str) -> Callable[[], object]:
    """What the harness must notice."""

    def raises() -> None:
        raise KeyError("x")

    def hangs() -> None:
        time.sleep(60)

    def grows() -> None:
        bytearray(2_000_000_000)

    def prints() -> None:
        print("hello")

    def ends() -> None:
        os._exit(3)

    def refuses() -> None:
        raise CarsamError("told in words")

    return {f.__name__: f for f in (raises, hangs, grows, prints, ends, refuses)}[name]
