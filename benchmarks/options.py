"""What the benchmarks share: their options, the lines that say what was run where, and their one table.

A benchmark prints the command that made its table, a line about the machine, and the table as Markdown.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

import carsam


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has.

    Args:
        description: The module's docstring.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, help="threads of torch; its own choice without")
    return made


def add_data(made: argparse.ArgumentParser, *, measured: bool) -> None:
    """Adds what a benchmark on real images needs: a model and its calibration images, and images to measure on.

    Args:
        made: The parser.
        measured: Whether quantized models are evaluated.
    """
    made.add_argument("model")
    made.add_argument("--images", required=True, help="folder of calibration images")
    made.add_argument("--coco", help="COCO file whose boxes prompt them; the model's own masks without")
    if measured:
        made.add_argument("--eval-images", required=True, help="image folder to measure on")
        made.add_argument("--eval-coco", required=True, help="its COCO file")
        made.add_argument("--n-images", type=int, default=32, help="calibration images")
        made.add_argument("--steps", type=int, help="optimiser steps of every unit; the method's own without")
        made.add_argument("--seed", type=int, default=0)
    made.add_argument("--bits", default="w4a4")


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Reads the command line, sets the threads, and prints the command and the machine."""
    arguments = made.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    print(shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]))
    graphics = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads{graphics}, carsam {carsam.__version__}\n")
    return arguments


def steps_of(arguments: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Settings of a method with reconstruction for ``--steps``; empty without it."""
    if arguments.steps is None:
        return {}
    return {"reconstruction": {"steps": arguments.steps, "decoder_steps": arguments.steps}}


def head(*columns: str) -> None:
    """The head of the table."""
    row(*columns)
    row(*["---"] * len(columns))


def row(*cells: object) -> None:
    """A row of the table, shown at once."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
