"""Preparation of images inside an encoder file, for tools that prepare them otherwise than the model wants."""

from __future__ import annotations

import numpy as np

from carsam.data.images.normalisation import IMAGENET, MIN_MAX, Normalisation
from carsam.export.graph import Stretch


def from_pixels(graph: Stretch, image: str, side: int, frame: int, normalisation: Normalisation, out: str) -> None:
    """RGB pixels (H, W, 3) float on 0..255, no side longer than ``frame``, to the model's input (1, 3, S, S).

    Args:
        graph: Where to.
        image: Name of the pixels.
        side: S.
        frame: Longest side that the tool resizes images to; if it is not the model's, they are resized once more,
            antialiased as Pillow does it.
        normalisation: The model's.
        out: Name of the result.
    """
    pixels = graph.node("Unsqueeze", graph.node("Transpose", image, perm=[2, 0, 1]), _ints(graph, [0]))
    if side != frame:
        size = graph.node("Slice", graph.node("Shape", image), _ints(graph, [0]), _ints(graph, [2]))
        size = _resized(graph, size, side / frame)
        sizes = graph.node("Concat", _ints(graph, [1, 3]), size, axis=0)
        pixels = graph.node("Resize", pixels, "", "", sizes, mode="linear", antialias=1)
        # Pillow's pixels are whole numbers.
        pixels = graph.node("Round", pixels)
    values = _normalised(graph, pixels, normalisation)
    size = graph.node("Slice", graph.node("Shape", values), _ints(graph, [2]), _ints(graph, [4]))
    missing = graph.node("Sub", _ints(graph, [side, side]), size)
    pads = graph.node("Concat", _ints(graph, [0] * 6), missing, axis=0)
    padded = graph.node("Pad", values, pads)
    graph.node("Reshape", padded, _ints(graph, [1, 3, side, side]), outputs=[out])


def from_imagenet(graph: Stretch, values: str, normalisation: Normalisation, out: str) -> None:
    """An input that was normalised by ImageNet's constants and padded with zeros, as the model normalises.

    A pixel with zeros in all channels is padding: no whole number from 0 to 255 becomes zero under these constants.
    """
    assert normalisation != IMAGENET
    zero = graph.constant("zero", 0, np.float32)
    colour = graph.node("ReduceSum", graph.node("Abs", values), _ints(graph, [1]), keepdims=1)
    inside = graph.node("Greater", colour, zero)
    channel = (1, 3, 1, 1)
    pixels = graph.node("Mul", values, graph.constant("std", np.reshape(IMAGENET.pixel_std, channel), np.float32))
    pixels = graph.node("Add", pixels, graph.constant("mean", np.reshape(IMAGENET.pixel_mean, channel), np.float32))
    pixels = graph.node("Round", pixels)
    result = _normalised(graph, pixels, normalisation, inside)
    graph.node("Where", inside, result, zero, outputs=[out])


def _normalised(graph: Stretch, pixels: str, normalisation: Normalisation, inside: str = "") -> str:
    """Pixels (1, 3, h, w) as :class:`Normalisation` says; ``inside`` names where they are the image's."""
    if normalisation.kind == MIN_MAX:
        low, high = pixels, pixels
        if inside:
            low = graph.node("Where", inside, pixels, graph.constant("most", 255, np.float32))
            high = graph.node("Where", inside, pixels, graph.constant("least", 0, np.float32))
        low, high = graph.node("ReduceMin", low, keepdims=1), graph.node("ReduceMax", high, keepdims=1)
        reach = graph.node("Max", graph.node("Sub", high, low), graph.constant("least", 1e-8, np.float32))
        return graph.node("Div", graph.node("Sub", pixels, low), reach)
    values = pixels
    if normalisation.factor is not None:
        values = graph.node("Mul", values, graph.constant("factor", normalisation.factor, np.float32))
    channel = (1, 3, 1, 1)
    values = graph.node("Sub", values, graph.constant("mean", np.reshape(normalisation.mean, channel), np.float32))
    return graph.node("Div", values, graph.constant("std", np.reshape(normalisation.std, channel), np.float32))


def _resized(graph: Stretch, size: str, factor: float) -> str:
    """A size (2,) int64 times a factor, rounded as segment-anything does, at least 1."""
    from onnx import TensorProto

    floats = graph.node(
        "Mul", graph.node("Cast", size, to=TensorProto.FLOAT), graph.constant("factor", factor, np.float32)
    )
    rounded = graph.node("Floor", graph.node("Add", floats, graph.constant("half", 0.5, np.float32)))
    rounded = graph.node("Max", rounded, graph.constant("one", 1, np.float32))
    return graph.node("Cast", rounded, to=TensorProto.INT64)


def _ints(graph: Stretch, values: list[int]) -> str:
    return graph.constant("ints", values, np.int64)
