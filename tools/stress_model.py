"""Writes the stressed twin of a SAM (METHOD.md, 9): the same outputs in floating point, harder to quantize.

python tools/stress_model.py embedded/sam-nano-256 runs/sam-nano-256-t1 --strength 1
"""

from __future__ import annotations

import argparse
import sys

import carsam
from carsam.transform.stress import stress


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what carsam quantize takes")
    parser.add_argument("out", help="folder to write (transformers form, FP32: FP16 would round the twin differently)")
    parser.add_argument("--strength", type=float, default=1.0, help="t; 0 changes nothing")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        twin = stress(carsam.load_model(arguments.model), arguments.strength, arguments.seed)
    except carsam.errors.CarsamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    twin.save_pretrained(arguments.out)
    print(f"{arguments.out}: {arguments.model} at strength {arguments.strength}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
