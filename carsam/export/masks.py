"""What becomes of a decoder's masks inside a file: one of several is chosen, and brought to the image's size."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from carsam.export.graph import Stretch


def to_original(graph: Stretch, masks: str, size: str, frame: int, out: str) -> None:
    """Mask logits (B, K, h, w) over the padded frame, at the original image's size (B, K, H, W).

    Bilinear to the frame, cropped, bilinear to the original, as ``segment_anything.utils.onnx.SamOnnxModel``; the crop
    follows ``size`` and is not frozen at a traced one.

    Args:
        graph: Where to.
        masks: Name of the logits.
        size: Name of the original size (2,), height and width, float32.
        frame: Side of the frame that the tool's coordinates lie in.
        out: Name of the result.
    """
    lead = graph.node("Slice", graph.node("Shape", masks), _ints(graph, [0]), _ints(graph, [2]))
    sizes = graph.node("Concat", lead, _ints(graph, [frame, frame]), axis=0)
    framed = _resize(graph, masks, sizes)
    longest = graph.node("ReduceMax", size, keepdims=1)
    scaled = graph.node("Mul", size, graph.node("Div", graph.constant("frame", [frame], np.float32), longest))
    rounded = graph.node("Floor", graph.node("Add", scaled, graph.constant("half", 0.5, np.float32)))
    rounded = graph.node("Max", rounded, graph.constant("one", 1, np.float32))
    end = graph.node("Cast", rounded, to=TensorProto.INT64)
    cropped = graph.node("Slice", framed, _ints(graph, [0, 0]), end, _ints(graph, [2, 3]))
    sizes = graph.node("Concat", lead, graph.node("Cast", size, to=TensorProto.INT64), axis=0)
    _resize(graph, cropped, sizes, out)


def stretched_to_original(graph: Stretch, masks: str, size: str, out: str) -> None:
    """Mask logits (B, K, h, w) over an image that was stretched to the frame, at its original size (B, K, H, W)."""
    lead = graph.node("Slice", graph.node("Shape", masks), _ints(graph, [0]), _ints(graph, [2]))
    sizes = graph.node("Concat", lead, graph.node("Cast", size, to=TensorProto.INT64), axis=0)
    _resize(graph, masks, sizes, out)


def to_side(graph: Stretch, masks: str, side: int, out: str) -> None:
    """Mask logits (B, K, h, w) as (B, K, side, side)."""
    lead = graph.node("Slice", graph.node("Shape", masks), _ints(graph, [0]), _ints(graph, [2]))
    _resize(graph, masks, graph.node("Concat", lead, _ints(graph, [side, side]), axis=0), out)


def best_mask(graph: Stretch, masks: str, iou: str, points: str, out: tuple[str, str]) -> None:
    """One mask a prompt (B, 1, h, w) with its IoU (B, 1), as segment-anything's ``return_single_mask``.

    With two points at most (one and the padding point) it is the best of the three of different extent, else the first,
    which is trained for prompts that leave no doubt.
    """
    count = graph.node("Gather", graph.node("Shape", points), graph.constant("one", 1, np.int64))
    count = graph.node("Cast", count, to=TensorProto.FLOAT)
    first = graph.node(
        "Mul",
        graph.node("Sub", count, graph.constant("few", 2.5, np.float32)),
        graph.constant("much", 1000, np.float32),
    )
    score = graph.node("Add", iou, graph.node("Mul", first, graph.constant("single", [[1, 0, 0, 0]], np.float32)))
    best = graph.node("ArgMax", score, axis=1, keepdims=1)
    graph.node("GatherElements", iou, best, axis=1, outputs=[out[1]])
    pairs = graph.node("Unsqueeze", best, _ints(graph, [2]))
    graph.node("GatherND", masks, pairs, batch_dims=1, outputs=[out[0]])


def _resize(graph: Stretch, x: str, sizes: str, out: str = "") -> str:
    outputs = [out] if out else 1
    return graph.node(
        "Resize", x, "", "", sizes, mode="linear", coordinate_transformation_mode="half_pixel", outputs=outputs
    )


def _ints(graph: Stretch, values: list[int]) -> str:
    return graph.constant("ints", values, np.int64)
