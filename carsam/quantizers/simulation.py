"""What is simulated right now: one state for the whole model, set by a context manager and never left on.

Public PTQ code kept such state as flags on every module, and left some of them on when scores were taken
(METHOD.md, 11). Here the state lives in one place and is restored when the ``with`` block ends. A packed model does
not read it at all: its quantizers always quantize.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Simulation:
    """The state that simulated layers read.

    Attributes:
        weights: Layers use their quantized weights (nearest, or learned while a unit is reconstructed).
        activations: Activation quantizers quantize.
        drop: Probability that an activation element stays in floating point (QDrop, ICLR 2022).
        drop_probs: Whether softmax outputs are dropped as well.
        settled: Activation quantizers without a grid let values pass instead of being an error: the model as far as it
            is quantized.
        observe: Called as ``observe(quantizer, values)`` before each activation quantizer, or None.
        whole_heads: Large attentions give P by whole heads also where nobody observes.
        mixed: Matrix products take bfloat16 operands (:func:`product`); all else stays in single precision.
    """

    weights: bool = False
    activations: bool = False
    drop: float = 0.0
    drop_probs: bool = True
    settled: bool = False
    observe: Callable[[Any, torch.Tensor], None] | None = None
    whole_heads: bool = False
    mixed: bool = False


# A module-level value and not a ContextVar: autograd runs backward passes (and recomputation in them) on threads of
# its own for CUDA, and those would not see the caller's context.
_current = Simulation()


def current() -> Simulation:
    """The simulation in force."""
    return _current


@contextmanager
def simulate(**changes: Any) -> Iterator[None]:
    """Changes the simulation within a ``with`` block; fields not named keep their value.

    Example:
        >>> with simulate(weights=True, activations=True):
        ...     quantized = model(pixel_values)
    """
    global _current
    previous = _current
    _current = replace(previous, **changes)
    try:
        yield
    finally:
        _current = previous


def product(operation: Callable[..., torch.Tensor], *operands: torch.Tensor | None, **options: Any) -> torch.Tensor:
    """A matrix product or convolution, in the precision that the simulation asks for.

    Args:
        operation: As ``torch.matmul``, ``F.linear``, ``F.conv2d``.
        operands: Tensors (and a bias that may be None) in single precision.
        options: What else the operation takes.

    Returns:
        Its result, in single precision.
    """
    if not _current.mixed:
        return operation(*operands, **options)
    return operation(*(None if each is None else each.bfloat16() for each in operands), **options).float()


# From here on a map in another order than its shape's costs more to reorder than all that is computed with it.
LARGE_MAP = 2**20


def channels_last(x: torch.Tensor) -> bool:
    """Whether a tensor is a large map (batch, channels, height, width) that lies in memory with its channels last.

    Smaller ones are not worth the trouble; sums over them keep the order of their shape.
    """
    return (
        x.dim() == 4
        and x.numel() >= LARGE_MAP
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def keep_mask_like(x: torch.Tensor, drop: float) -> torch.Tensor:
    """:func:`keep_mask` for the elements of ``x``, in the order in which they lie in memory."""
    if not channels_last(x):
        return keep_mask(x.shape, drop, x.device)
    return keep_mask(x.permute(0, 2, 3, 1).shape, drop, x.device).permute(0, 3, 1, 2)


def keep_mask(shape: torch.Size, drop: float, device: torch.device) -> torch.Tensor:
    """Which elements are quantized: True with probability ``1 - drop``.

    At the usual 0.5 one random 64-bit word serves 64 elements: the CPU generator is serial, and a global attention of
    ViT-B has 200 million softmax outputs a step.

    Returns:
        Boolean tensor of ``shape``.
    """
    if drop != 0.5:
        return torch.rand(shape, device=device) >= drop
    count = shape.numel()
    words = torch.randint(-(2**63), 2**63 - 1, ((count + 63) // 64,), dtype=torch.int64, device=device)
    octets = words.view(torch.uint8)
    bits = (octets[:, None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
    return bits.view(torch.bool).flatten()[:count].view(shape)
