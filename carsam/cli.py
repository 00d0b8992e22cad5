"""The console script ``carsam``: finds the command, and turns errors that the user can fix into one paragraph."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from carsam.commands.common import errors_for_people, show_warnings
from carsam.commands.streams import prepare_streams
from carsam.version import __version__

# In the order of the help. A new command is a module in carsam/commands and its name here.
COMMANDS = (
    *("quantize", "evaluate", "predict", "compare", "diagnose", "report"),
    *("export", "benchmark", "info", "methods", "push"),
)


class _Command(TyperCommand):
    """A command whose arguments hold something."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for before, argument in zip(["", *args], args):
            # An empty path would mean the current folder, and stands there where a shell's variable was not set.
            if not argument or (argument.startswith("--") and argument.endswith("=")):
                where = argument.rstrip("=") or (before if before.startswith("-") else "") or "an argument"
                raise typer.BadParameter(f"{where} is empty; is a variable in the command not set?", ctx)
        return super().parse_args(ctx, args)


class _Group(TyperGroup):
    """Runs a command; errors of carsam end it without a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        prepare_streams()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with errors_for_people():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    # Anything but a CarsamError is a defect of carsam: its plain traceback is what a report needs.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"carsam {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Segment Anything in 4 bits: post-training quantization with CAR-SAM."""
    show_warnings()


for _name in COMMANDS:
    app.command(_name, cls=_Command)(getattr(importlib.import_module(f"carsam.commands.{_name}"), _name))


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="carsam")


if __name__ == "__main__":
    main()
