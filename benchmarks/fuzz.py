"""Damaged and hostile files of every kind that carsam reads, by a fixed seed.

    python -m benchmarks.fuzz --count 2000                         # about ten minutes on two cores
    python -m benchmarks.fuzz --seed 0 --kind coco --index 17      # one of them, with its traceback

Each input is read by the function that the command uses, some by the command itself, and must end in success or in an
error for people, within 5 s and 3 GB, without a word on the standard output. A packed folder that opens must compute
what it computed before. The last line counts the faults; the exit code is 1 where there are any.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fuzz")]

from harness import MEGABYTES, SECONDS, Case, Outcome, Runner, plan  # noqa: E402

# Every stage of a quantization, in a few seconds.
_QUICK = {
    "reconstruction": {"steps": 2, "decoder_steps": 2},
    "mac": {"solver": "pooled"},
    "weight_observer": "min-max",
    "activation_observer": "min-max",
}


def pack(folder: Path) -> Path:
    """A packed folder of the embedded model."""
    import carsam
    from carsam.config import CalibrationConfig, QuantizeConfig

    data = ROOT / "embedded" / "images" / "calibration"
    settings = CalibrationConfig(coco=str(data / "instances.json"), n_images=2, boxes_per_image=2)
    config = QuantizeConfig("car-sam", settings=_QUICK, calibration=settings)
    carsam.quantize(ROOT / "embedded" / "sam-nano-256", data / "images", config, out=folder / "packed")
    return folder / "packed"


def table(outcomes: list[Outcome]) -> str:
    """A line a kind: how many were read, refused, and faults, and the longest time."""
    lines = ["| kind | inputs | read | refused | faults | longest |", "| --- | --- | --- | --- | --- | --- |"]
    for kind in dict.fromkeys(outcome.case.kind for outcome in outcomes):
        found = [outcome for outcome in outcomes if outcome.case.kind == kind]
        counts = Counter(outcome.outcome for outcome in found)
        longest = max(outcome.seconds for outcome in found)
        numbers = f"{counts['read']} | {counts['refused']} | {counts['fault']} | {longest:.1f} s"
        lines.append(f"| {kind} | {len(found)} | {numbers} |")
    return "\n".join(lines)


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="only this kind")
    parser.add_argument("--index", type=int, help="only this input of the kind")
    parser.add_argument("--messages", action="store_true", help="print every message")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--megabytes", type=int, default=MEGABYTES)
    parser.add_argument("--packed", type=Path, help="packed folder of the embedded model; made where not given")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "report"))
    from kinds import KINDS

    cases = plan(arguments.count, {kind: share for kind, (_, share) in KINDS.items()}, arguments.seed)
    cases = [case for case in cases if arguments.kind in (None, case.kind)]
    if arguments.index is not None:
        cases = [Case(arguments.kind, arguments.index, arguments.seed)]
    outcomes: list[Outcome] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        packed = arguments.packed or pack(Path(folder))
        with Runner(packed, arguments.seconds, arguments.megabytes) as runner:
            for outcome in runner.run(cases):
                outcomes.append(outcome)
                if outcome.outcome == "fault":
                    print(f"fault: {outcome.case.command}\n{outcome.text}\n", flush=True)
                elif arguments.messages or arguments.index is not None:
                    print(f"{outcome.case.kind} {outcome.case.index} {outcome.outcome}: {outcome.text}", flush=True)
    faults = sum(outcome.outcome == "fault" for outcome in outcomes)
    print(table(outcomes))
    print(f"\n{len(outcomes)} inputs, {faults} faults, {time.perf_counter() - started:.0f} s (seed {arguments.seed})")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
