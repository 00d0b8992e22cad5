"""Transposes that wait until values are codes."""

import numpy as np
import pytest

from carsam.export.graph import Stretch
from carsam.export.transposes import sunk


def graph(*, read_as_floats):
    """x (1, 3, 4, 5) with channels last → first, an activation that reads its input twice, codes, their values."""
    stretch = Stretch("site")
    first = stretch.node("Transpose", "x", perm=[0, 3, 1, 2], name="move")
    half = stretch.node("Mul", first, stretch.constant("half", 0.5, np.float32))
    bent = stretch.node("Add", stretch.node("Erf", first), stretch.constant("one", 1, np.float32))
    active = stretch.node("Mul", half, bent)
    grid = stretch.constant("scale", 0.125, np.float32), stretch.constant("zero", 3, np.uint8)
    codes = stretch.node("QuantizeLinear", active, *grid)
    codes = stretch.node("Clip", codes, stretch.constant("low", 0, np.uint8), stretch.constant("high", 15, np.uint8))
    stretch.node("DequantizeLinear", codes, *grid, outputs=["y"])
    stretch.node("Softmax", active if read_as_floats else codes_as_floats(stretch, codes), axis=1, outputs=["z"])
    return stretch


def codes_as_floats(stretch, codes):
    return stretch.node("Cast", codes, to=1)


@pytest.mark.parametrize("read_as_floats", [False, True])
def test_a_transpose_moves_only_where_codes_alone_are_read(read_as_floats, run_stretch):
    stretch = graph(read_as_floats=read_as_floats)
    x = np.random.default_rng(0).standard_normal((1, 4, 5, 3)).astype(np.float32)
    expected = run_stretch(stretch, {"x": x}, ["y", "z"])
    stretch.nodes = sunk(stretch.nodes, stretch.constants, ["y", "z"], ["site/move"])
    order = [node.op_type for node in stretch.nodes]
    assert order.index("Transpose") == (0 if read_as_floats else order.index("Clip") + 1)
    for found, wanted in zip(run_stretch(stretch, {"x": x}, ["y", "z"]), expected):
        np.testing.assert_array_equal(found, wanted)


def test_a_transpose_moves_to_a_convolution_with_the_numbers_of_its_channels(run_stretch):
    stretch = Stretch("site")
    first = stretch.node("Transpose", "x", perm=[0, 3, 1, 2], name="move")
    step = stretch.constant("step", np.array([0.5, 0.25, 2.0]).reshape(1, 3, 1, 1), np.float32)
    low = stretch.constant("low", np.array([-2.0, -1.0, 0.0]).reshape(1, 3, 1, 1), np.float32)
    steps = stretch.node("Max", stretch.node("Round", stretch.node("Div", stretch.node("Erf", first), step)), low)
    decoded = stretch.node("Mul", steps, step)
    weight = stretch.constant("weight", np.arange(27).reshape(3, 1, 3, 3), np.float32)
    stretch.node("Conv", decoded, weight, group=3, outputs=["y"])
    x = np.random.default_rng(0).standard_normal((1, 4, 5, 3)).astype(np.float32)
    (expected,) = run_stretch(stretch, {"x": x}, ["y"])
    stretch.nodes = sunk(stretch.nodes, stretch.constants, ["y"], ["site/move"])
    assert [node.op_type for node in stretch.nodes] == ["Erf", "Div", "Round", "Max", "Mul", "Transpose", "Conv"]
    (found,) = run_stretch(stretch, {"x": x}, ["y"])
    np.testing.assert_array_equal(found, expected)
