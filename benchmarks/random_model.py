"""A SAM of a published size with random weights, as a folder that every command opens.

    python benchmarks/random_model.py vit-b runs/sam-b

Time, memory and size do not depend on the weights: ``carsam benchmark`` measures them on it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from carsam.data.images.transforms import preprocessor_config
from carsam.models.sam.random import SIZES, random_sam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image-size", type=int, default=1024)
    arguments = parser.parse_args()
    model = random_sam(arguments.size, arguments.image_size)
    model.save_pretrained(arguments.folder)
    text = json.dumps(preprocessor_config(model), indent=2) + "\n"
    (arguments.folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
    print(f"{arguments.folder}: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.0f} million weights")


if __name__ == "__main__":
    main()
