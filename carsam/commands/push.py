"""``carsam push``: a packed model to the Hugging Face Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from carsam.commands.common import out


def push(
    model: Annotated[str, typer.Argument(help="What carsam quantize wrote.", metavar="DIR", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub.", metavar="OWNER/NAME", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make the model private where it is new.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to write to.", show_default="main")] = None,
) -> None:
    """Upload a packed model, with its model card, to the Hugging Face Hub."""
    from carsam.pack.checkpoint import load

    load(model).push_to_hub(repo_id, private=private or None, revision=revision)
    out.print(f"https://huggingface.co/{repo_id}", markup=False, soft_wrap=True)
