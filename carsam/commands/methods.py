"""``carsam methods``: what can follow ``--method``, and what can follow ``--set``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from carsam.commands.common import out


def methods(
    name: Annotated[
        str | None, typer.Argument(help="A method, to list its settings and their defaults.", show_default=False)
    ] = None,
) -> None:
    """List the quantization methods."""
    from carsam.methods.base import create, registry

    if name is None:
        table = Table("method", "what it does", "grids")
        for method, cls in registry().items():
            table.add_row(method, cls.summary, cls().notes or "uniform")
    else:
        table = Table(f"setting of {name} (--set KEY=VALUE)", "default")
        for key, value in flatten(create(name).to_dict()):
            table.add_row(key, str(value))
    out.print(table)


def flatten(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (dotted key, value) pairs."""
    pairs = []
    for key, value in settings.items():
        pairs += flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs
