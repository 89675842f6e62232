"""Shapes found on the view are those that ONNX infers of the file written from it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from export import write_view
from export.flavors import without_custom_operators
from export.graph.shapes import edge_shapes
from export.passes.rewrite import arrange
from quantizers.integer import AveragePool, Concat, Conv, MaxPool


def inferred(path) -> dict[str, tuple[int, ...]]:
    model = without_custom_operators(onnx.load(path))
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        entry.name: tuple(dim.dim_value for dim in entry.type.tensor_type.shape.dim)
        for entry in (*graph.value_info, *graph.output)
    }


def assert_as_onnx(view, shape, path, at_least: int) -> None:
    write_view(view, [shape], path, flavor="qonnx")  # its batch is fixed: ONNX infers every size
    found = inferred(path)
    view = arrange(view)
    wanted = edge_shapes(view, [(1, *shape[1:])])
    compared = [edge for edge in wanted if edge in found and edge not in view.outputs]
    assert len(compared) >= at_least
    assert {edge: found[edge] for edge in compared} == {edge: wanted[edge] for edge in compared}
    for name, edge in zip(("logits", "logits_2"), view.outputs, strict=False):
        assert found[name] == wanted[edge]


def test_every_kind_of_layer(residual, tmp_path):
    assert_as_onnx(residual, (2, 3, 15, 15), tmp_path / "n.onnx", 15)


@pytest.mark.parametrize("size", [9, 10, 11, 12])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_windows(net, tmp_path, size, ceil_mode):
    net.image()
    net.keep(MaxPool("max", ("image",), "max", (3, 2), (2, 3), (1, 0, 1, 0), (1, 2), False))
    net.keep(MaxPool("second", ("image",), "second", (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), ceil_mode))
    net.real(AveragePool("mean", ("second",), "mean", (2, 2), (2, 2), (0, 0, 0, 0), ceil_mode, False))
    net.quantize("mean", "low", 4, 1 / 8, -8)
    net.conv("low", "c", (3, 4), kernel=(2, 1), stride=(1, 2), padding=(0, 1, 2, 1), dilation=(1, 1))
    view = net.view("c", "max")
    assert_as_onnx(view, (2, 3, size, size), tmp_path / "n.onnx", 4)


def test_moves(net, tmp_path):
    net.image()
    net.shape("image", "padded", "pad", before=(0, 0, 1, 0), after=(0, 0, 2, 3))
    net.shape("padded", "turned", "transpose", perm=(0, 2, 1, 3))
    net.shape("turned", "cut", "slice", axis=-1, start=1, end=None)
    net.shape("cut", "picked", "gather", axis=1, indices=[0, 0, 5])
    net.shape("picked", "opened", "reshape", shape=(0, 1, -1, 17))
    net.shape("opened", "spread", "expand", shape=(1, 2, 9, 17))
    net.shape("spread", "kept", "reshape", shape=(0, -1, 17))
    net.shape("kept", "flat", "flatten", axis=1)
    net.keep(Concat("twice", ("flat", "flat"), "twice", -1))
    assert_as_onnx(net.view("twice"), (2, 3, 15, 15), tmp_path / "n.onnx", 8)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 5, 15, 15), r"conv1: Conv cannot take \[\(1, 5, 15, 15\)\]: it has 3 input channels"),
        ((1, 3, 15), r"conv1: Conv cannot take \[\(1, 3, 15\)\]: it takes \[batch, channels, height, width\]"),
    ],
)
def test_shapes_that_do_not_fit_name_the_layer(residual, shape, message):
    with pytest.raises(ValueError, match=message):
        edge_shapes(residual, [shape])


def test_windows_that_do_not_fit_and_wrong_counts(net, residual):
    net.conv(net.image(), "c", (3, 4), kernel=(5, 5), padding=(0,) * 4)
    with pytest.raises(ValueError, match=r"c: Conv cannot take .*: no window of \(5, 5\) fits"):
        edge_shapes(net.view("c"), [(1, 3, 4, 4)])
    with pytest.raises(ValueError, match="the view has 1 inputs, got 2 shapes"):
        edge_shapes(residual, [(1, 3, 15, 15), (1, 3, 15, 15)])
    assert isinstance(residual.nodes[1], Conv) and np.prod(edge_shapes(residual, [(1, 3, 15, 15)])["fc"]) == 5
