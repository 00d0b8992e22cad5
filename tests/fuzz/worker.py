"""A process that reads mutated inputs one by one, within bounds of memory; started by :mod:`harness`.

It takes lines of JSON (``{"kind": ..., "index": ..., "seed": ...}``) on its standard input and answers each with a line
on the file descriptor that its first argument names.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, BinaryIO, TextIO


def main() -> None:
    # Whatever is printed is caught: a reader says nothing on its standard output.
    with os.fdopen(int(sys.argv[1]), "w") as answers, tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 1)
        serve(answers, printed)


def serve(answers: TextIO, printed: BinaryIO) -> None:
    """Reads the inputs that the standard input names, until it ends."""
    root, packed, most = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    sys.path[:0] = [str(root), str(root / "tests" / "fuzz"), str(root / "tests" / "report")]
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)

    base = warmed(root, packed) if int(sys.argv[5]) else None
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + most, in_use + most))
    answer(answers, {"outcome": "ready"})
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for line in sys.stdin:
            case = json.loads(line)
            place = Path(folder) / f"{case['kind'].split()[-1]}-{case['index']}"
            place.mkdir()
            found = run(case, place, base)
            sys.stdout.flush()
            if printed.seek(0, os.SEEK_END) and found["outcome"] != "fault":
                printed.seek(0)
                found = {"outcome": "fault", "text": f"printed {printed.read(200)!r}"}
            printed.seek(0)
            printed.truncate()
            shutil.rmtree(place, ignore_errors=True)
            answer(answers, found)


def warmed(root: Path, packed: Path) -> Any:
    """What is mutated, with the models loaded."""
    import torch
    from fuzz_base import Base

    torch.set_num_threads(1)
    base = Base(root, packed)
    assert base.model is not None and base.packed_output
    return base


def run(case: dict[str, Any], place: Path, base: Any) -> dict[str, Any]:
    """What became of one input."""
    from self_test import PREFIX, self_test

    from carsam.errors import CarsamError

    rng = random.Random(f"{case['seed']}/{case['kind']}/{case['index']}")
    if case["kind"].startswith(PREFIX):
        read = self_test(case["kind"].removeprefix(PREFIX))
    else:
        from kinds import KINDS

        read = KINDS[case["kind"]][0](rng, place, base)
    started = time.monotonic()
    try:
        read()
        found = {"outcome": "read"}
    except CarsamError as error:
        found = {"outcome": "refused", "text": str(error)[:500]}
        if not str(error).strip():
            found = {"outcome": "fault", "text": "an error without a message"}
    except (Exception, SystemExit, KeyboardInterrupt):  # this is what is looked for
        found = {"outcome": "fault", "text": traceback.format_exc()[-2500:]}
    return {**found, "seconds": time.monotonic() - started}


def answer(answers: TextIO, values: dict[str, Any]) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
