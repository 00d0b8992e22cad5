"""The QDQ form of an exported file computes what the file does, in ONNX Runtime and in OpenVINO."""

import numpy as np
import onnx
import pytest
from small_models import small_model

from carsam.benchmark.nearest import nearest
from carsam.export.qdq import PRODUCT, as_qdq
from carsam.models.family import family_of
from carsam.runtime.onnx import DECODER, ENCODER, write_halves

onnxruntime = pytest.importorskip("onnxruntime", reason="an optional package: carsam[onnx]")


@pytest.fixture(scope="module", params=["w8a8", "w4a4"])
def files(request, tmp_path_factory):
    """An integer file's encoder, its QDQ form's path, and an image."""
    pixels = np.random.default_rng(0).standard_normal((1, 3, 128, 128)).astype(np.float32)
    model = nearest(small_model("sam"), request.param, [pixels])
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "w4a4":
            # As on large images: the encoder's attentions in a loop, whose products lie in a graph of their own.
            patch.setattr("carsam.export.attention.PART", 2**12)
            patch.setattr("carsam.export.attention.UNROLLED_PART", 2**12)
        folder = write_halves(model, family_of(model), tmp_path_factory.mktemp("qdq") / "halves")
        plain = write_halves(model, family_of(model), folder / "plain", loops=False)
    looped = "Scan" in {node.op_type for node in onnx.load(str(folder / ENCODER)).graph.node}
    assert looped == (request.param == "w4a4")
    for name in (ENCODER, DECODER):
        made = as_qdq(onnx.load(str(plain / name)))
        onnx.checker.check_model(made)
        # OpenVINO's reader refuses loops.
        assert not {PRODUCT, "Scan"} & kinds(made.graph.node)
        (folder / f"qdq-{name}").write_bytes(made.SerializeToString())
    return folder, pixels, request.param


def kinds(nodes):
    """Operators of nodes and of the graphs inside them."""
    found = {node.op_type for node in nodes}
    return found.union(*(kinds(a.g.node) for node in nodes for a in node.attribute if a.HasField("g")))


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def run(path, pixels):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"pixel_values": pixels})[0]


def test_onnx_runtime_computes_the_same(files):
    folder, pixels, _ = files
    # Floating-point sums in another order move a value over the edge of its step now and then.
    assert relative(run(folder / f"qdq-{ENCODER}", pixels), run(folder / ENCODER, pixels)) < 0.02


def test_openvino_computes_the_same_in_its_integer_kernels(files):
    openvino = pytest.importorskip("openvino", reason="an optional package: carsam[openvino]")
    folder, pixels, bits = files
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(folder / f"qdq-{ENCODER}"), "CPU", settings)
    ours = compiled({"pixel_values": pixels})[0]
    assert relative(ours, run(folder / ENCODER, pixels)) < (0.02 if bits == "w8a8" else 0.2)
    kinds = [
        (str(node.get_rt_info()["layerType"].astype(str)), str(node.get_rt_info()["runtimePrecision"].astype(str)))
        for node in compiled.get_runtime_model().get_ops()
    ]
    products = [precision for layer, precision in kinds if layer == "FullyConnected"]
    assert len(products) >= 8 and set(products) <= {"i8", "u8"}
