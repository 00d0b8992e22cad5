"""A large model's image encoder on ONNX Runtime, float and in integers, with little memory beside the files' own.

    python benchmarks/random_model.py vit-l sam-l
    python benchmarks/encoders.py sam-l --bits w8a8 --bits w4a4 --keep files --threads 2

As ``carsam benchmark``, but the files are written by a process that ends before anything is timed, and only encoders
run: a float ViT-L alone needs 10 GB there. Files that the folder holds already are taken as they are.
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path
from statistics import median

import numpy as np

from carsam.benchmark.process import SubjectProcess
from carsam.benchmark.processor import busy, processor

FLOAT = "float"


def write(source: str, name: str, folder: str) -> None:
    """Writes both halves of the float model, or of one rounded to nearest on the ranges of an image of noise."""
    from carsam.benchmark.nearest import nearest
    from carsam.models.family import family_of
    from carsam.models.load import load_model
    from carsam.runtime.onnx import write_halves

    model = load_model(source)
    family = family_of(model)
    if name != FLOAT:
        side = family.image_size(model)
        noise = np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)
        model = nearest(model, name, [noise])
    write_halves(model, family, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what carsam quantize takes")
    parser.add_argument("--bits", action="append", default=[], help="as w8a8; repeatable")
    parser.add_argument("--keep", type=Path, required=True, help="folder for the files")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only-write", action="store_true", help="time nothing")
    arguments = parser.parse_args()
    names = [FLOAT, *arguments.bits]
    for name in names:
        folder = arguments.keep / name
        if not (folder / "decoder.onnx").is_file():
            maker = multiprocessing.get_context("spawn").Process(
                target=write, args=(arguments.model, name, str(folder))
            )
            maker.start()
            maker.join()
            if maker.exitcode:
                raise SystemExit(f"{name}: its files could not be written")
    if arguments.only_write:
        return
    print(f"{processor()}; {arguments.threads} threads; others at work: load {busy():.1f}")
    files = {name: arguments.keep / name for name in names}
    processes = {
        name: SubjectProcess(
            {
                "kind": "onnxruntime",
                "threads": arguments.threads,
                "encoder": str(folder / "encoder.onnx"),
                "decoder": str(folder / "decoder.onnx"),
            }
        )
        for name, folder in files.items()
    }
    side = 1024
    image = {"pixel_values": np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)}
    times: dict[str, list[float]] = {name: [] for name in names}
    # One round warms up.
    for number in range(arguments.rounds + 1):
        for name, process in processes.items():
            taken, _ = process.run("encoder", image)
            if number:
                times[name].append(taken)
    print("| encoder | file | peak memory | ms | × |")
    print("| --- | --- | --- | --- | --- |")
    base = median(times[FLOAT])
    for name, process in processes.items():
        size = sum(path.stat().st_size for path in files[name].glob("encoder.onnx*"))
        print(
            f"| {name} | {size / 1e6:.1f} MB | {process.peak_bytes() / 1e9:.2f} GB | {median(times[name]):.0f} | "
            f"{base / median(times[name]):.2f} |",
            flush=True,
        )
    for process in processes.values():
        process.close()


if __name__ == "__main__":
    main()
