"""Capturing what reaches a module: run until it is called, keep its arguments, stop there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Stop(Exception):
    """Ends a forward pass at the captured module; nothing after it is computed."""


def capture_call(module: nn.Module, run: Callable[[], Any], *, output: bool = False) -> Any:
    """Runs ``run()`` until ``module`` is called and returns what it was called with.

    Args:
        module: The module to wait for.
        run: Starts the forward pass.
        output: Return the module's output instead of its arguments.

    Returns:
        ``(args, kwargs)`` of the call, or its output.

    Raises:
        RuntimeError: ``run()`` ended without calling the module.
    """
    seen: list[Any] = []

    def before(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args, kwargs))
        raise _Stop

    def after(_module: nn.Module, _args: tuple, result: Any) -> None:
        seen.append(result)
        raise _Stop

    hook = module.register_forward_hook(after) if output else module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    except _Stop:
        pass
    finally:
        hook.remove()
    if not seen:
        raise RuntimeError(f"the forward pass never reached {type(module).__name__}")
    return seen[0]


def tensors_only(values: dict[str, Any]) -> dict[str, Tensor]:
    """The entries that are tensors (optional arguments left at None drop out)."""
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
