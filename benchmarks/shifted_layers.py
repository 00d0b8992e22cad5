"""What a shift per channel costs a layer in ONNX Runtime: milliseconds with one range, and with a shift.

    python benchmarks/shifted_layers.py --threads 1

Linears of ViT-B's encoder at 1024 px (4,096 tokens) and of the stand-in's (256 tokens), 4-bit weights and inputs, on
noise. Medians over repeats, the two files taking turns.
"""

from __future__ import annotations

import time
from statistics import median

import numpy as np
import onnx
import onnxruntime
import options
import torch
from torch import nn

from carsam.export.graph import Stretch, model_of
from carsam.export.layers import lower_layer
from carsam.pack.layers import PackedLayer
from carsam.quantizers import ActivationQuantizer, QuantizedLayer, ShiftedQuantizer, SiteQuantizer

BITS = 4
# Name, tokens, inputs, outputs.
LAYERS = (
    ("ViT-B, projections", 4096, 768, 2304),
    ("ViT-B, first of an MLP", 4096, 768, 3072),
    ("ViT-B, second of an MLP", 4096, 3072, 768),
    ("stand-in, projections", 256, 192, 576),
    ("stand-in, second of an MLP", 256, 768, 192),
)


def session(
    layer: nn.Linear, quantizer: SiteQuantizer, rows: torch.Tensor, threads: int
) -> onnxruntime.InferenceSession:
    """A layer alone, its input's grid set on its very input."""
    record = quantizer.record()
    record.update(rows, weight=layer.weight)
    record.fit(quantizer, "min-max")
    quantized = QuantizedLayer(layer, BITS, quantizer)
    quantized.fit_weight("min-max")
    quantized.freeze()
    graph, shape = Stretch("layer"), (1, len(rows), layer.out_features)
    lower_layer(graph, PackedLayer.from_quantized(quantized), "x", "y", ((1, *rows.shape), shape))
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims)
        for name, dims in (("x", (1, *rows.shape)), ("y", shape))
    ]
    proto = onnx.helper.make_graph(graph.nodes, "layer", ends[:1], ends[1:], graph.constants)
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        model_of(proto, {}).SerializeToString(), chosen, providers=["CPUExecutionProvider"]
    )


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = options.parse(parser)
    options.head("layer", "ms, one range", "ms, shifted", "ratio")
    for name, tokens, inputs, outputs in LAYERS:
        rows = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(0))
        made = [
            session(nn.Linear(inputs, outputs).requires_grad_(False), quantizer, rows, torch.get_num_threads())
            for quantizer in (ActivationQuantizer(BITS), ShiftedQuantizer(BITS))
        ]
        feed, times = {"x": rows[None].numpy().astype(np.float32)}, ([], [])
        for _ in range(arguments.repeats + 1):
            for each, into in zip(made, times):
                begun = time.perf_counter()
                each.run(None, feed)
                into.append(1e3 * (time.perf_counter() - begun))
        one, shifted = (median(each[1:]) for each in times)
        options.row(name, f"{one:.1f}", f"{shifted:.1f}", f"{shifted / one:.2f}")


if __name__ == "__main__":
    main()
