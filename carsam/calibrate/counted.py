"""Tells how far several loops are that together take long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
# Goes through items and tells of each that is done.
Counted = Callable[[Iterable[T]], Iterable[T]]


def uncounted(items: Iterable[T]) -> Iterable[T]:
    """:data:`Counted` that tells nobody."""
    return items


class Count:
    """:data:`Counted` over all loops that it is given to.

    Args:
        total: Items of all loops together.
        advance: Called with the items done and their total.
    """

    def __init__(self, total: int, advance: Callable[[int, int], None]):
        self.done, self.total, self._advance = 0, total, advance
        advance(0, total)

    def __call__(self, items: Iterable[T]) -> Iterator[T]:
        for item in items:
            yield item
            self.done += 1
            self._advance(min(self.done, self.total), self.total)
