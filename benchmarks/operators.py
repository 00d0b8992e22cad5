"""Where the time of ONNX files goes: milliseconds of every operator in ONNX Runtime, file beside file.

    carsam benchmark MODEL --keep files
    python benchmarks/operators.py files/float-*/encoder.onnx files/w8a8-*/encoder.onnx --threads 2

Profiled passes on noise, after one that warms up; profiling itself takes a few percent. ``Reorder`` and ``Transpose``
move values between layouts, ``QuantizeLinear`` and ``DequantizeLinear`` between codes and floats.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime


def operators(path: Path, threads: int, passes: int) -> Counter:
    """Milliseconds a pass by operator."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        generator = np.random.default_rng(0)
        shapes = {
            each.name: [size if isinstance(size, int) else 1 for size in each.shape] for each in session.get_inputs()
        }
        inputs = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(passes + 1):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = sorted(each["ts"] for each in events if each.get("name") == "model_run")
    found: Counter = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= runs[1]:
            found[event["args"]["op_name"]] += event["dur"] / 1000 / passes
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--passes", type=int, default=7)
    arguments = parser.parse_args()
    columns = [operators(path, arguments.threads, arguments.passes) for path in arguments.files]
    print("| operator, ms a pass | " + " | ".join(f"{path.parent.name}/{path.name}" for path in arguments.files) + " |")
    print("| --- | " + "---: | " * len(columns))
    total = sum(columns, Counter())
    for name, _ in total.most_common(16):
        print(f"| {name} | " + " | ".join(f"{column[name]:.1f}" if column[name] else "" for column in columns) + " |")
    others = [sum(value for name, value in each.items() if name not in dict(total.most_common(16))) for each in columns]
    print("| others | " + " | ".join(f"{value:.1f}" for value in others) + " |")
    print("| all | " + " | ".join(f"{sum(column.values()):.1f}" for column in columns) + " |")


if __name__ == "__main__":
    main()
