"""Evenly spaced samples: which of many values stand for all of them. Every pick is fixed; nothing is random."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
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


def sampled_patches(
    x: Tensor,
    kernel: tuple[int, int],
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    most: int,
) -> Tensor:
    """What some outputs of a convolution are computed from, at an odd step through all of its places.

    As ``unfold`` gives it and a stride picks from, but only what is picked is ever copied: nine times a map of SAM's
    size is a gigabyte.

    Args:
        x: Input (batch, channels, height, width).
        kernel, stride, padding, dilation, groups: The convolution's; zeros are padded.
        most: Places at most.

    Returns:
        (groups, places, channels of a group · kernel's elements).
    """
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
    height, width = ((n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(x.shape[2:], dilation, kernel, stride))
    places = torch.arange(0, len(x) * height * width, odd_step_within(len(x) * height * width, most), device=x.device)
    batch, place = places // (height * width), places % (height * width)
    row, column = place // width * stride[0], place % width * stride[1]
    taps = [
        x[batch, :, row + i * dilation[0], column + j * dilation[1]] for i in range(kernel[0]) for j in range(kernel[1])
    ]
    found = torch.stack(taps, dim=-1)  # (places, channels, kernel)
    return found.unflatten(1, (groups, -1)).flatten(2).transpose(0, 1)
