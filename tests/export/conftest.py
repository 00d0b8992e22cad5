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
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(model_of(proto, {}).SerializeToString(), options)
        return session.run(outputs, inputs)

    return run
