"""Stretches of graphs run alone, and models packed in memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from carsam.export.graph import Stretch, model_of  # noqa: E402


@pytest.fixture(scope="session")
def run_stretch() -> Callable[..., list[np.ndarray]]:
    """Runs a stretch: ``run_stretch(graph, {"x": array}, ["y"])`` gives the outputs."""

    def run(graph: Stretch, inputs: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
        kinds = {np.dtype("float32"): onnx.TensorProto.FLOAT}
        described = [onnx.helper.make_tensor_value_info(k, kinds[v.dtype], v.shape) for k, v in inputs.items()]
        # Of any type: it is inferred.
        results = [onnx.ValueInfoProto(name=name) for name in outputs]
        proto = onnx.helper.make_graph(graph.nodes, "stretch", described, results, graph.constants)
        return run_model(model_of(proto, {}), inputs, outputs)

    return run


@pytest.fixture(scope="session", name="run_model")
def run_model_fixture() -> Callable[..., list[np.ndarray]]:
    """Runs a whole model: ``run_model(proto, {"x": array})`` gives its outputs."""
    return run_model


def run_model(model, inputs: dict[str, np.ndarray], outputs: list[str] | None = None) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(outputs, inputs)
