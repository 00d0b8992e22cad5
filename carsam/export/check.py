"""Proof that an exported file computes in integers: from the graph that ONNX Runtime makes of it, and from a profile.

A file says of every quantized site how many multiply-accumulates it has. ONNX Runtime is asked for its optimised graph
and for a profile of one run; what was executed by integer kernels, with integer inputs, under the names of quantized
layers, is counted from the shapes in the profile and set against that.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from carsam.errors import CheckpointError, ConfigError
from carsam.export.requirements import require_runtime
from carsam.export.trace import POINTS

# Share of the quantized layers' multiply-accumulates that integer kernels must execute.
LEAST_SHARE = 0.95
INTEGER = frozenset(
    {
        "MatMulIntegerToFloat",
        "MatMulInteger",
        "DynamicQuantizeMatMul",
        "QLinearMatMul",
        "QGemm",
        "QLinearConv",
        "ConvInteger",
    }
)
FLOATING = frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv", "NhwcFusedConv"})
_FREE = {"num_points": POINTS, "nb_points_per_image": POINTS - 1}


@dataclass(frozen=True)
class Proof:
    """What was executed of one file.

    Attributes:
        file: Its name.
        macs: Multiply-accumulates of quantized layers, as the file says.
        integer: Of these, executed by integer kernels.
        floating: Executed by floating-point kernels under a quantized layer's name.
        attention_integer, attention_floating: Of quantized attentions' MatMuls, executed by either.
        missing: Quantized layers of which no integer kernel was executed.
        operators: Nodes of the optimised graph by operator.
        milliseconds: Time by operator in the profiled run.
    """

    file: str
    macs: int
    integer: int
    floating: int
    attention_integer: int
    attention_floating: int
    missing: tuple[str, ...]
    operators: dict[str, int]
    milliseconds: dict[str, float]

    @property
    def share(self) -> float:
        """Share of the quantized layers' multiply-accumulates in integer kernels; 1 where nothing is quantized."""
        return self.integer / self.macs if self.macs else 1.0


def prove(path: Path) -> Proof:
    """Runs a file once and counts.

    Raises:
        ConfigError: ONNX Runtime is missing or too old.
        CheckpointError: The file is not one of carsam's, or ONNX Runtime cannot run it.
    """
    require_runtime()
    import onnx
    import onnxruntime

    model = onnx.load(str(path), load_external_data=False)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if "carsam.sites" not in properties:
        raise CheckpointError(f"{path} was not written by this version of carsam; export the model again.")
    sites = {site["site"]: site for site in json.loads(properties["carsam.sites"])}
    with tempfile.TemporaryDirectory(prefix="carsam-check-") as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            session.run(None, {each.name: _input(each) for each in session.get_inputs()})
        except Exception as error:  # ONNX Runtime's errors have no common base but this
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"ONNX Runtime {onnxruntime.__version__} cannot run {path}: {reason}. Update it, or export again."
            ) from error
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        optimised = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return _count(path.name, sites, events, Counter(_operators(optimised.graph)))


def _operators(graph: Any) -> list[str]:
    found = []
    for node in graph.node:
        found.append(node.op_type)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found += _operators(attribute.g)
    return found


def _count(name: str, sites: dict[str, dict], events: list[dict], operators: Counter) -> Proof:
    layers = {site for site, facts in sites.items() if facts["kind"] == "layer"}
    done: dict[str, Counter] = {"integer": Counter(), "floating": Counter()}
    times: Counter = Counter()
    for event in events:
        arguments = event.get("args", {})
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        operator = arguments.get("op_name", "")
        times[operator] += event["dur"] / 1000
        site = event["name"].rpartition("/")[0]
        if site not in sites or operator not in INTEGER | FLOATING:
            continue
        kinds = [next(iter(each)) for each in arguments["input_type_shape"]]
        integer = operator in INTEGER and kinds[0] in ("uint8", "int8")
        done["integer" if integer else "floating"][site] += _macs(operator, arguments)

    def total(kernels: str, kind: str) -> int:
        # A grid of two zones takes two products for one: what it takes more is no more of the layer.
        found = done[kernels]
        return sum(min(found[site], facts["macs"]) for site, facts in sites.items() if facts["kind"] == kind)

    return Proof(
        name,
        sum(sites[site]["macs"] for site in layers),
        total("integer", "layer"),
        total("floating", "layer"),
        total("integer", "attention"),
        total("floating", "attention"),
        tuple(sorted(layers - set(done["integer"]))),
        dict(operators.most_common()),
        {operator: round(time, 3) for operator, time in times.most_common()},
    )


def _macs(operator: str, arguments: dict) -> int:
    """Multiply-accumulates of one executed kernel, from its shapes."""
    inputs = [next(iter(each.values())) for each in arguments["input_type_shape"]]
    output = next(iter(arguments["output_type_shape"][0].values()))
    if "Conv" in operator:
        # A convolution's weights are its second input, or the fourth where the first has a scale and a zero point.
        weight = inputs[3] if operator == "QLinearConv" else inputs[1]
        return int(np.prod(output)) * int(np.prod(weight[1:]))
    return int(np.prod(output)) * int(inputs[0][-1])


def _input(described: Any) -> np.ndarray:
    """Something to run a file on: noise for images, a prompt in the middle."""
    shape = [size if isinstance(size, int) else _FREE.get(size, 1) for size in described.shape]
    generator = np.random.default_rng(0)
    kind = {"tensor(int64)": np.int64}.get(described.type, np.float32)
    if described.name == "orig_im_size":
        return np.array([480, 640], kind)
    if described.name == "input_image":
        return generator.integers(0, 256, (768, 1024, 3)).astype(kind)
    if "label" in described.name:
        return np.ones(shape, kind)
    if "mask" in described.name:
        return np.zeros(shape, kind)
    values = generator.standard_normal(shape)
    return (values * 20 + 100 if "point" in described.name else values).astype(kind)


def check_share(proofs: list[Proof]) -> None:
    """Fails where too little of the quantized layers, over all files, runs in integers.

    Raises:
        ConfigError: With the layers.
    """
    macs, integer = (sum(getattr(proof, name) for proof in proofs) for name in ("macs", "integer"))
    share = integer / macs if macs else 1.0
    if share < LEAST_SHARE:
        missing = [layer for proof in proofs for layer in proof.missing]
        raise ConfigError(
            f"only {100 * share:.1f} % of the quantized layers' multiply-accumulates run in integer kernels, less than "
            f"{100 * LEAST_SHARE:.0f} %; in floating point are {', '.join(missing[:4])}"
            f"{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}. export.json says why."
        )
