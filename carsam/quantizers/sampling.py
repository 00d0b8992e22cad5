"""Evenly spaced samples: which of many values stand for all of them. Every pick is fixed; nothing is random."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def step_for(count: int, wanted: int) -> int:
    """Step that leaves at least ``wanted`` of ``count`` values, where there are as many."""
    return max(1, count // wanted)


def odd_step_for(count: int, wanted: int) -> int:
    """:func:`step_for`, made odd: it walks through all channels (or columns) instead of seeing the same ones again."""
    return step_for(count, wanted) | 1


def odd_step_within(count: int, most: int) -> int:
    """Odd step that leaves at most ``most`` of ``count`` values."""
    return math.ceil(count / most) | 1


def strided(values: Tensor, wanted: int) -> Tensor:
    """Values at an odd step, (n,) from any shape; a view where the values lie in one piece.

    Args:
        values: Any shape.
        wanted: About how many to keep: two thirds to twice as many are, and all where there are fewer.
    """
    flat = values.flatten()
    return flat[:: odd_step_for(flat.numel(), wanted)]


def even_ranks(ranked: Tensor, wanted: int) -> Tensor:
    """At most ``wanted`` of sorted values, (n,), at even ranks with both ends."""
    last = len(ranked) - 1
    return ranked[torch.linspace(0, last, min(len(ranked), wanted)).round().long()]
