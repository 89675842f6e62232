"""Every pooling in the file computes PyTorch's windows: shapes and values, optimizations off and on."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional as F

from export import cost_of_view, write_view
from export.cost.program import program_of_view
from export.cost.reading import program_of_file
from export.passes.windows import explicit_windows
from export.runtime import open_session
from quantizers.integer import AveragePool, MaxPool

STEP = 0.37 / 16  # of the means' grid: no mean of codes is on a tie of it


def combinations(kernels, strides):
    for kernel, stride, padding, ceil_mode in itertools.product(kernels, strides, (0, 1), (False, True)):
        if padding <= min(kernel) // 2:
            yield kernel, stride, (padding, padding), ceil_mode


MEANS = [
    (*window, counts)
    for window in combinations([(2, 2), (3, 3), (2, 3)], [(1, 1), (2, 2), (3, 3), (2, 3)])
    for counts in (False, True)
]
MAXIMA = [
    (*window, dilation)
    for window in combinations([(2, 2), (3, 3), (2, 3)], [(1, 1), (2, 2), (3, 3), (3, 2)])
    for dilation in ((1, 1), (2, 2), (3, 1))
]


def fits(size, kernel, dilation, padding):
    return all(n + 2 * p >= d * (k - 1) + 1 for n, k, d, p in zip(size, kernel, dilation, padding, strict=True))


@pytest.mark.parametrize("size", [(5, 5), (6, 7), (7, 6), (8, 8), (3, 9)])
def test_every_mean_is_torch_s(net, tools, tmp_path, size):
    images = np.random.default_rng(size[0]).standard_normal((2, 2, *size)).astype(np.float32) * 4
    net.quantize("x", "a", 8, 1 / 16, -128)
    used = [one for one in MEANS if fits(size, one[0], (1, 1), one[2])]
    for number, (kernel, stride, padding, ceil_mode, counts) in enumerate(used):
        pool = AveragePool(f"p{number}", ("a",), f"p{number}", kernel, stride, padding * 2, ceil_mode, counts)
        net.quantize(net.real(pool), f"q{number}", 8, STEP, -128)
    view = net.view(*(f"q{number}" for number in range(len(used))))
    exported = write_view(view, [images.shape], tmp_path / "n.onnx")
    assert exported.operators["QLinearAveragePool"] == len(used) and not exported.fall_backs
    real = torch.tensor(np.clip(np.rint(images * 16), -128, 127)).double() / 16
    for optimize in (False, True):
        found = open_session(tmp_path / "n.onnx", optimize=optimize).run(None, {"images": images})
        for one, values in zip(used, found, strict=True):
            kernel, stride, padding, ceil_mode, counts = one
            wanted = F.avg_pool2d(real, kernel, stride, padding, ceil_mode, counts) / STEP
            assert values.shape == wanted.shape, one
            np.testing.assert_array_equal(np.rint(values / STEP), wanted.round().clamp(-128, 127), err_msg=f"{one}")
    _costs_agree(view, images.shape, tmp_path / "n.onnx")


@pytest.mark.parametrize("low", [0, -128, -100])
@pytest.mark.parametrize("size", [(5, 5), (6, 7), (8, 8), (9, 5)])
def test_every_maximum_is_torch_s(net, tools, tmp_path, size, low):
    images = np.random.default_rng(size[1]).standard_normal((2, 2, *size)).astype(np.float32) * 4
    net.quantize("x", "a", 8, 1 / 16, low)
    used = [one for one in MAXIMA if fits(size, one[0], one[4], one[2])]
    for number, (kernel, stride, padding, ceil_mode, dilation) in enumerate(used):
        net.keep(MaxPool(f"p{number}", ("a",), f"p{number}", kernel, stride, padding * 2, dilation, ceil_mode))
    view = net.view(*(f"p{number}" for number in range(len(used))))
    write_view(view, [images.shape], tmp_path / "n.onnx")
    real = torch.tensor(np.clip(np.rint(images * 16), low, low + 255)) / 16
    for optimize in (False, True):
        found = open_session(tmp_path / "n.onnx", optimize=optimize).run(None, {"images": images})
        for one, values in zip(used, found, strict=True):
            kernel, stride, padding, ceil_mode, dilation = one
            wanted = F.max_pool2d(real, kernel, stride, padding, dilation, ceil_mode)
            assert values.shape == wanted.shape, one
            np.testing.assert_array_equal(values, wanted.numpy(), err_msg=f"{one}")
    _costs_agree(view, images.shape, tmp_path / "n.onnx")


def _costs_agree(view, shape, path):
    assert cost_of_view(view, [shape]).student.macs == 0
    ours, theirs = program_of_view(view, [shape]), program_of_file(path)
    sizes = {operation.name: ours.values[operation.output].count for operation in ours.operations}
    read = {operation.name: theirs.values[operation.output].count for operation in theirs.operations}
    assert {name: read[name] for name in sizes if name in read} == {n: s for n, s in sizes.items() if n in read}


def test_the_example_of_a_window_that_starts_in_the_padding(net, tmp_path):
    """AvgPool2d(2, 2, padding=1, ceil_mode=True) on 7 x 7 gives 4 x 4, not 5 x 5."""
    net.quantize("x", "a", 8, 1 / 16, -128)
    net.quantize(net.real(AveragePool("p", ("a",), "p", (2, 2), (2, 2), (1, 1, 1, 1), True, True)), "q", 8, STEP, -128)
    write_view(net.view("q"), [(1, 2, 7, 7)], tmp_path / "n.onnx")
    model = onnx.load(tmp_path / "n.onnx")
    assert [dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim][1:] == [2, 4, 4]
    assert not [a for node in model.graph.node for a in node.attribute if a.name == "ceil_mode" and a.i]


def test_views_without_such_windows_are_left_alone(residual):
    assert explicit_windows(residual, [(1, 3, 15, 15)]) is residual
