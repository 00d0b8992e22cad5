"""Packed weights in an ONNX file, and the few operations that unpack them when the file is loaded.

ONNX Runtime folds operations on constants before the first run, so the codes lie packed in the file and as INT8 in
memory. A code of b bits is cut into planes of 4, 2 and 1 bits; in a byte of a plane lie the codes of as many equal
parts of the matrix, so that unpacking is a shift and a mask and joining the parts.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from carsam.export.graph import Stretch


def planes(bits: int) -> list[tuple[int, int]]:
    """``(shift, width)`` of the planes of a code: 6 bits are 4 low ones and 2 above."""
    found, shift = [], 0
    for width in (4, 2, 1):
        if bits - shift >= width and shift + width <= bits:
            found.append((shift, width))
            shift += width
    return found


def pack_plane(codes: np.ndarray, shift: int, width: int) -> np.ndarray:
    """One plane of codes (count,) uint8 in ⌈count · width / 8⌉ bytes; the parts of the codes lie above one another."""
    parts = 8 // width
    plane = (codes >> shift) & (2**width - 1)
    rows = np.pad(plane, (0, -len(plane) % parts)).reshape(parts, -1)
    shifts = (np.arange(parts, dtype=np.uint8) * width)[:, None]
    return np.bitwise_or.reduce(rows << shifts, axis=0).astype(np.uint8)


def unpacked(graph: Stretch, codes: np.ndarray, bits: int) -> str:
    """Adds codes, packed, and what unpacks them.

    Args:
        graph: Where to.
        codes: Any shape, uint8 in ``[0, 2^bits)``.
        bits: 2 to 8.

    Returns:
        Name of a tensor of that shape, uint8.
    """
    if bits == 8:
        return graph.constant("codes", codes, np.uint8)
    whole = ""
    for shift, width in planes(bits):
        packed = graph.constant("packed", pack_plane(codes.reshape(-1), shift, width), np.uint8)
        mask = graph.constant("mask", 2**width - 1, np.uint8)
        parts = []
        for part in range(8 // width):
            moved = packed
            if part:
                by = graph.constant("shift", part * width, np.uint8)
                moved = graph.node("BitShift", packed, by, direction="RIGHT")
            # The topmost part has nothing above it.
            parts.append(moved if part == 8 // width - 1 else graph.node("BitwiseAnd", moved, mask))
        plane = graph.node("Concat", *parts, axis=0)
        if codes.size % (8 // width):
            ends = [graph.constant("end", [value], np.int64) for value in (0, codes.size)]
            plane = graph.node("Slice", plane, *ends)
        if shift:
            plane = graph.node("BitShift", plane, graph.constant("shift", shift, np.uint8), direction="LEFT")
        whole = graph.node("BitwiseOr", whole, plane) if whole else plane
    return graph.node("Reshape", whole, graph.constant("shape", codes.shape, np.int64))


def integer_matrix(graph: Stretch, codes: np.ndarray, zero_point: np.ndarray, bits: int) -> tuple[str, str]:
    """A weight matrix as INT8 with a zero point for every column, for ONNX Runtime's U8S8 kernels.

    Codes of up to 7 bits are INT8 as they are; 8-bit codes move down by 128, and their zero points with them.

    Args:
        graph: Where to.
        codes: (inputs, outputs) uint8.
        zero_point: (outputs,).
        bits: Of a code.

    Returns:
        Names of the matrix and the zero points, both int8.
    """
    if bits == 8:
        matrix = graph.constant("codes", codes.astype(np.int16) - 128, np.int8)
        return matrix, graph.constant("weight_zero_point", zero_point.astype(np.int16) - 128, np.int8)
    matrix = graph.node("Cast", unpacked(graph, codes, bits), to=TensorProto.INT8, name="weight")
    return matrix, graph.constant("weight_zero_point", zero_point, np.int8)


def float_weight(graph: Stretch, codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, bits: int) -> str:
    """Weights decoded when the file is loaded: ``(codes − zero_point) · scale``.

    Args:
        graph: Where to.
        codes: (outputs, ...) uint8.
        scale, zero_point: (outputs,).
        bits: Of a code.

    Returns:
        Name of a float32 tensor of the codes' shape.
    """
    channel = (-1, *[1] * (codes.ndim - 1))
    values = graph.node("Cast", unpacked(graph, codes, bits), to=TensorProto.FLOAT)
    values = graph.node("Sub", values, graph.constant("zero", zero_point.reshape(channel), np.float32))
    return graph.node("Mul", values, graph.constant("weight_scale", scale.reshape(channel), np.float32))
