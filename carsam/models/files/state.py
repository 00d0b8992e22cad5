"""Finds a model's tensors in what a checkpoint file holds: wrapped in mappings, under a prefix, beside others."""

from __future__ import annotations

import logging

from torch import Tensor

from carsam.models.files.torch import mappings

logger = logging.getLogger(__name__)


def find_state(content: object, anchor: str, source: str) -> dict[str, Tensor] | None:
    """The tensors of a model in a checkpoint's content; None where there are none.

    The first mapping counts, outermost first, that holds the anchor tensor; its prefix is stripped. Tensors without
    that prefix are no part of the model and are left out with a warning.

    Args:
        content: What the file holds.
        anchor: Name of a tensor that every such model has.
        source: What messages call the file.
    """
    for mapping in mappings(content):
        found = next((key for key in mapping if isinstance(key, str) and key.endswith(anchor)), None)
        if found is None:
            continue
        prefix = found[: -len(anchor)]
        tensors = {str(key): value for key, value in mapping.items() if isinstance(value, Tensor)}
        others = [key for key in tensors if not key.startswith(prefix)]
        if others:
            logger.warning(
                "%s: only the tensors under %r are SAM's; %s left out.",
                source,
                prefix,
                some(others) + (" was" if len(others) == 1 else " were"),
            )
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return None


def some(names: list[str], limit: int = 3) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
