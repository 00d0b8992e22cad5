"""Signals that ask a command to end, as one kind of interrupt. Only the command line uses them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_NOTE = b"\ncarsam: stopping; please wait a moment.\n"


class Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C asked the process to end.

    Attributes:
        code: The exit code that shells expect: 143 for SIGTERM, 129 for SIGHUP.
    """

    code = 143


class HungUp(Terminated):
    """The terminal went away."""

    code = 129


@contextmanager
def interrupts() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end a block as Ctrl-C does.

    The first signal raises; the second, which comes while the first one's clean-up runs, is answered with a line, so
    that the clean-up ends; the third raises again. A signal that the parent process wants ignored (``nohup``) stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = {"SIGINT": KeyboardInterrupt, "SIGTERM": Terminated, "SIGHUP": HungUp}
    count = 0

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count == 2:
            with suppress(OSError):
                os.write(2, _NOTE)
            return
        raise kinds[signal.Signals(number).name]

    before = {}
    for name in kinds:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def message(interrupt: BaseException) -> str:
    """What an interrupt, or one that it came on top of, says is kept; empty where none says anything."""
    error: BaseException | None = interrupt
    while error is not None:
        if isinstance(error, KeyboardInterrupt) and str(error):
            return str(error)
        error = error.__context__
    return ""
