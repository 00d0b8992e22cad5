"""One subject in a process of its own, so that its memory is its own.

Imports nothing that its runtime does not need: a subject of ONNX Runtime runs without torch. Requests and answers are
pickled mappings on the standard streams of a process that carsam itself has started.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Tensors = dict[str, np.ndarray]


class OnnxRuntime:
    """Both halves on ONNX Runtime.

    Args:
        spec: ``encoder`` and ``decoder`` paths, ``threads``.
    """

    def __init__(self, spec: dict[str, Any]):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = spec["threads"]
        options.log_severity_level = 3
        # Others are timed in turn: a thread that spins would take their time.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.sessions = {
            half: onnxruntime.InferenceSession(spec[half], options, providers=["CPUExecutionProvider"])
            for half in ("encoder", "decoder")
        }

    def run(self, half: str, inputs: Tensors) -> Tensors:
        session = self.sessions[half]
        names = [each.name for each in session.get_inputs()]
        outputs = session.run(None, {name: inputs[name] for name in names})
        return dict(zip((each.name for each in session.get_outputs()), outputs))


class OpenVino:
    """Both halves on OpenVINO.

    Args:
        spec: ``encoder`` and ``decoder`` paths, ``threads``, ``precision`` of what is in floating point.
    """

    def __init__(self, spec: dict[str, Any]):
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": spec["threads"],
            "INFERENCE_PRECISION_HINT": spec["precision"],
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.models = {half: core.compile_model(spec[half], "CPU", settings) for half in ("encoder", "decoder")}

    def run(self, half: str, inputs: Tensors) -> Tensors:
        model = self.models[half]
        given = {name: inputs[name] for each in model.inputs for name in each.names if name in inputs}
        outputs = model(given)
        return {next(iter(each.names)): np.array(outputs[each]) for each in model.outputs}


class Torch:
    """Both halves in PyTorch.

    Args:
        spec: ``source`` of the model, ``threads``; ``dtype`` of the image encoder, whether it is ``compiled``, whether
            torchao quantizes its Linears dynamically to ``int8``.
    """

    def __init__(self, spec: dict[str, Any]):
        import torch

        from carsam.models.family import family_of
        from carsam.models.load import load_model

        torch.set_num_threads(spec["threads"])
        self.torch = torch
        model = load_model(spec["source"], image_size=spec.get("image_size"))
        halves = family_of(model).halves(model)
        encoder, decoder, self.names = halves.encoder, halves.decoder, halves.names
        self.dtype = getattr(torch, spec["dtype"])
        inside = family_of(model).embedding_module(model)
        if spec.get("int8"):
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            quantize_(inside, Int8DynamicActivationInt8WeightConfig())
        inside.to(self.dtype)
        self.halves = {"encoder": encoder, "decoder": decoder}
        if spec.get("compiled"):
            self.halves = {half: torch.compile(module, dynamic=False) for half, module in self.halves.items()}

    def run(self, half: str, inputs: Tensors) -> Tensors:
        torch = self.torch
        with torch.inference_mode():
            if half == "encoder":
                tensors = self.halves[half](torch.from_numpy(inputs["pixel_values"]).to(self.dtype))
                return {name: tensor.float().numpy() for name, tensor in zip(self.names, tensors)}
            order = (*self.names, "points", "labels", "mask", "has_mask")
            logits, iou = self.halves[half](*(torch.from_numpy(inputs[name]) for name in order))
            return {"logits": logits.numpy(), "iou": iou.numpy()}


KINDS = {"onnxruntime": OnnxRuntime, "openvino": OpenVino, "torch": Torch}


def peak_bytes() -> int:
    """The most memory that this process has had; 0 where nothing tells."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        from carsam.run.memory import peak_memory

        return peak_memory()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Opens a subject and does what it is asked to, until the requests end."""

    def answer(content: dict[str, Any]) -> None:
        pickle.dump(content, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()

    subject = None
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        try:
            if request["do"] == "open":
                began = time.perf_counter()
                subject = KINDS[request["spec"]["kind"]](request["spec"])
                answer({"seconds": time.perf_counter() - began})
            elif request["do"] == "memory":
                answer({"bytes": peak_bytes()})
            else:
                began = time.perf_counter()
                outputs = subject.run(request["do"], request["inputs"])
                answer({"ms": 1e3 * (time.perf_counter() - began), "outputs": outputs if request["keep"] else {}})
        except Exception as error:  # told to the parent, whose row says it
            answer({"error": f"{type(error).__name__}: {str(error)[:400]}"})


def main() -> None:
    # Libraries print; answers have a stream of their own.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
