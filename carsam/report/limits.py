"""What the page has room for: a folder that claims more is told so, before anything is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from carsam.errors import DataError

# Longer ones would be no names.
MAX_TEXT = 1000
# A diagnosis of ViT-H has about 2,500 mappings.
MAX_MAPPINGS = 30_000
MAX_ITEMS = 5_000
# Lists that may be longer, since a row of the page does not belong to each item, or must be shorter, since a table has
# as many columns.
_MAX_ITEMS_OF = {"per_image": 1_000_000, "ious": 1_000_000, "losses": 1_000_000, "moments": 200, "stages": 200}
# These are counted by their own bound.
_UNCOUNTED = ("per_image",)


def shortened(value: Any) -> Any:
    """The value with every long text and key cut."""
    if isinstance(value, dict):
        return {key[:MAX_TEXT]: shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shortened(item) for item in value]
    return value[: MAX_TEXT - 1] + "…" if isinstance(value, str) and len(value) > MAX_TEXT else value


def check_amounts(values: dict[str, Any], path: Path, fix: str) -> None:
    """Refuses a file that holds more than any model and any diagnosis gives.

    Args:
        values: What the file holds.
        path: The file, for the message.
        fix: What to do about it, for the message.

    Raises:
        DataError: A list is too long, or there are too many entries.
    """
    mappings = 0
    waiting: list[tuple[str, Any]] = [("", values)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            mappings += key not in _UNCOUNTED
            waiting += value.items()
        elif isinstance(value, list):
            if len(value) > _MAX_ITEMS_OF.get(key, MAX_ITEMS):
                raise DataError(f"{path} holds {len(value)} entries under {key!r}, too many for a report; {fix}.")
            waiting += [(key, item) for item in value if isinstance(item, (dict, list))]
    if mappings > MAX_MAPPINGS:
        raise DataError(f"{path} holds {mappings} entries, too many for a report; {fix}.")
