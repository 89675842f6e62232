"""The written graph computes the integers of the view: compared with exact numpy arithmetic, no tolerance."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional as F

from export import ExportError, write_view
from export.runtime import open_session
from quantizers.integer import Add, AveragePool, Concat, Function, GlobalAveragePool, Grid, MaxPool, Mul


def assert_equal(tools, view, path, images, *, on=True):
    """Compare every quantizer's codes and the logits, optimizations off and (unless told otherwise) on."""
    write_view(view, [images.shape], path)
    wanted = tools.reference(view, images)
    outputs = {node.name: node.output for node in view.nodes}
    for optimize in (False, True) if on else (False,):
        logits, codes = tools.run_file(path, images, optimize=optimize)
        for name, found in codes.items():
            np.testing.assert_array_equal(found, wanted[outputs[name]], err_msg=f"{name}, {optimize=}")
        last = view.outputs[0]
        scale = view.grids[last].scale if last in view.grids else 1.0
        np.testing.assert_array_equal(logits, (wanted[last] * scale).astype(np.float32), err_msg=f"{optimize=}")
        assert np.unique(logits).size > 1
    return codes


CONVOLUTIONS = {
    "plain": {},
    "stride": {"stride": (2, 1)},
    "asymmetric padding": {"padding": (0, 1, 2, 0)},
    "dilation": {"dilation": (2, 2), "padding": (2, 2, 2, 2)},
    "groups": {"groups": 2},
    "kernel": {"kernel": (1, 5), "padding": (0, 2, 0, 2)},
    "one scale": {"per_channel": False},
    "no bias": {"bias": False},
    **{f"{bits} bits": {"bits": bits} for bits in range(2, 9)},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize(("bits", "low"), [(2, 0), (8, -128)])
def test_convolution(net, tools, images, tmp_path, options, bits, low):
    net.quantize(net.conv(net.image(), "first", (3, 4), bits=8), "a", bits, 0.5, low)
    net.quantize(net.conv("a", "second", (4, 6), **options), "b", bits, 1.0, low)
    assert_equal(tools, net.view("b"), tmp_path / "net.onnx", images)


def test_depthwise_convolution_of_a_shifted_grid_pads_with_the_real_zero(net, tools, images, tmp_path):
    net.quantize(net.conv(net.image(), "first", (3, 4), bits=8), "a", 4, 0.5, -3)
    net.quantize(net.conv("a", "second", (4, 4), groups=4), "b", 8, 0.25, -128)
    assert_equal(tools, net.view("b"), tmp_path / "net.onnx", images)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_gives_real_logits(net, tools, images, tmp_path, bias):
    net.shape(net.image(4), "flat", "flatten", axis=1)
    assert_equal(tools, net.view(net.linear("flat", "fc", (3 * 15 * 15, 7), bias=bias)), tmp_path / "n.onnx", images)


def test_every_kind_of_layer_together(residual, tools, images, tmp_path):
    codes = assert_equal(tools, residual, tmp_path / "n.onnx", images)
    assert all(np.unique(values).size > 3 for values in codes.values())


def test_sum_of_unsigned_and_shifted_operands(net, tools, images, tmp_path):
    net.quantize(net.conv(net.image(), "left", (3, 4)), "l", 8, 0.25, -128)
    net.quantize(net.conv("image", "right", (3, 4)), "r", 8, 0.25, 0)
    net.real(Add("sum", ("l", "r"), "sum"))
    assert_equal(tools, net.view(net.quantize("sum", "s", 4, 2.0, 0)), tmp_path / "n.onnx", images)


def test_product_broadcasts_over_space(net, tools, images, tmp_path):
    net.quantize(net.conv(net.image(), "body", (3, 4)), "b", 8, 0.25, 0)
    net.quantize(net.conv("image", "gate", (3, 4), kernel=(15, 15), padding=(0,) * 4), "g", 4, 0.25, 0)
    net.real(Mul("product", ("b", "g"), "product"))
    assert_equal(tools, net.view(net.quantize("product", "p", 8, 1.0, 0)), tmp_path / "n.onnx", images)


def test_concatenation_keeps_the_grid(net, tools, images, tmp_path):
    net.quantize(net.conv(net.image(), "left", (3, 4)), "l", 4, 1.0)
    net.quantize(net.conv("image", "right", (3, 2)), "r", 4, 1.0)
    net.keep(Concat("cat", ("l", "r"), "cat", 1))
    assert_equal(tools, net.view(net.quantize(net.conv("cat", "c", (6, 3)), "o", 4, 2.0)), tmp_path / "n.onnx", images)


@pytest.mark.parametrize("keepdims", [True, False])
def test_global_mean(net, tools, tmp_path, keepdims):
    images = np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32) * 8
    net.quantize(net.conv(net.image(), "c", (3, 4)), "a", 8, 0.5)
    net.real(GlobalAveragePool("mean", ("a",), "mean", keepdims))
    assert_equal(tools, net.view(net.quantize("mean", "m", 8, 0.25)), tmp_path / "n.onnx", images)


MOVES = {
    "flatten": ({"axis": 1}, "flatten"),
    "flatten keeps leading axes": ({"axis": 2}, "flatten"),
    "reshape": ({"shape": (-1, 2, 2, 225)}, "reshape"),
    "reshape copies an axis": ({"shape": (0, 2, -1)}, "reshape"),
    "transpose": ({"perm": (0, 2, 3, 1)}, "transpose"),
    "slice": ({"axis": 1, "start": 1, "end": 3}, "slice"),
    "gather": ({"axis": 2, "indices": [0, 0, 3, 2]}, "gather"),
    "pad": ({"before": (0, 0, 1, 0), "after": (0, 0, 2, 3)}, "pad"),
    "pad of any axis": ({"before": (0, 2, 0, 0), "after": (0, 1, 3, 0)}, "pad"),
    "slice with a step": ({"axis": 3, "start": 1, "end": 14, "step": 3}, "slice"),
    "identity": ({}, "identity"),
}


@pytest.mark.parametrize(("attributes", "op"), MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("quantized_first", [True, False])
def test_moves(net, tools, images, tmp_path, attributes, op, quantized_first):
    net.conv(net.image(), "c", (3, 4))
    if quantized_first:
        net.quantize("c", "a", 4, 0.5, -8)
        last = net.shape("a", "moved", op, **attributes)
    else:
        net.shape("c", "moved", op, **attributes)
        last = net.quantize("moved", "a", 4, 0.5, -8)
    exported = write_view(net.view(last), [images.shape], tmp_path / "n.onnx")
    assert not exported.warnings  # in either order the convolution is an integer kernel
    assert_equal(tools, net.view(last), tmp_path / "n.onnx", images)


WINDOWS = [
    # kernel, stride, padding, ceil_mode
    ((2, 2), (2, 2), (0, 0), False),
    ((2, 2), (2, 2), (0, 0), True),
    ((3, 3), (2, 2), (1, 1), False),
    ((3, 3), (2, 2), (1, 1), True),
    ((3, 2), (2, 3), (1, 0), True),
    ((3, 3), (3, 3), (0, 0), True),
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "ceil_mode"), WINDOWS)
@pytest.mark.parametrize("size", [11, 12, 13])
@pytest.mark.parametrize("low", [0, -128])
def test_max_pool_is_torch_s(net, tools, tmp_path, kernel, stride, padding, ceil_mode, size, low):
    images = np.random.default_rng(size).standard_normal((2, 3, size, size)).astype(np.float32) * 3
    net.quantize("x", "a", 8, 1 / 16, low)
    net.keep(MaxPool("pool", ("a",), "pool", kernel, stride, padding * 2, (1, 1), ceil_mode))
    path = tmp_path / "n.onnx"
    write_view(net.view("pool"), [images.shape], path)
    _, codes = tools.run_file(path, images, optimize=False)
    wanted = F.max_pool2d(torch.tensor(codes["a_quant"]).double(), kernel, stride, padding, ceil_mode=ceil_mode) / 16
    for optimize in (False, True):
        np.testing.assert_array_equal(tools.run_file(path, images, optimize=optimize)[0], wanted.numpy())


@pytest.mark.parametrize(("kernel", "stride", "padding", "ceil_mode"), WINDOWS)
@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize("size", [11, 12, 13])
def test_average_pool_is_torch_s(net, tools, tmp_path, kernel, stride, padding, ceil_mode, count_include_pad, size):
    images = np.random.default_rng(size).standard_normal((2, 3, size, size)).astype(np.float32) * 3
    net.quantize("x", "a", 8, 1 / 16, -128)
    net.real(AveragePool("pool", ("a",), "pool", kernel, stride, padding * 2, ceil_mode, count_include_pad))
    net.quantize("pool", "p", 8, 1 / 16, -128)
    path = tmp_path / "n.onnx"
    assert "QLinearAveragePool" in write_view(net.view("p"), [images.shape], path).operators
    _, codes = tools.run_file(path, images, optimize=False)
    real = torch.tensor(codes["a_quant"]).double()
    wanted = F.avg_pool2d(real, kernel, stride, padding, ceil_mode, count_include_pad)
    # a mean half-way between two codes may go either way: the kernel multiplies by a rounded 1 / count
    tie = (wanted - wanted.floor() - 0.5).abs() < 1e-9
    for optimize in (False, True):
        found = torch.tensor(tools.run_file(path, images, optimize=optimize)[1]["p_quant"])
        assert torch.equal(found[~tie], wanted.round().long()[~tie])
        assert (found - wanted).abs().max() <= 0.5 + 1e-9


FUNCTIONS = {
    "relu": ({}, F.relu),
    "relu6": ({}, F.relu6),
    "silu": ({}, F.silu),
    "hardswish": ({}, F.hardswish),
    "sigmoid": ({}, torch.sigmoid),
    "hardsigmoid": ({}, F.hardsigmoid),
    "gelu": ({}, F.gelu),
    "tanh": ({}, torch.tanh),
    "leaky_relu": ({"negative_slope": 0.2}, lambda x: F.leaky_relu(x, 0.2)),
    "elu": ({"alpha": 0.5}, lambda x: F.elu(x, 0.5)),
    "selu": ({}, F.selu),
    "mish": ({}, F.mish),
    "softsign": ({}, F.softsign),
    "hardtanh": ({"min_val": -0.5, "max_val": 2.0}, lambda x: F.hardtanh(x, -0.5, 2.0)),
    "clamp": ({"min": -0.25}, lambda x: x.clamp(min=-0.25)),
    "softmax": ({"axis": 1}, lambda x: x.softmax(1)),
    "log_softmax": ({"axis": 1}, lambda x: x.log_softmax(1)),
}


@pytest.mark.parametrize("op", FUNCTIONS)
def test_functions_are_torch_s(net, images, tmp_path, op):
    attributes, function = FUNCTIONS[op]
    net.image()
    net.real(Function("f", ("image",), "f", op=op, attributes=attributes))
    write_view(net.view("f"), [images.shape], tmp_path / "n.onnx")
    real = torch.tensor(np.clip(np.rint(images * 16), -128, 127) / 16).float()
    found = open_session(tmp_path / "n.onnx", optimize=False).run(None, {"images": images})[0]
    np.testing.assert_allclose(found, function(real).numpy(), rtol=2e-6, atol=1e-6)


def test_function_output_feeds_a_quantizer(net, images, tmp_path):
    net.quantize(net.conv(net.image(), "c", (3, 4)), "a", 8, 0.25, -128)
    net.real(Function("act", ("a",), "act", op="sigmoid"))
    exported = write_view(net.view(net.quantize("act", "s", 8, 1 / 256)), [images.shape], tmp_path / "n.onnx")
    assert "QLinearSigmoid" in exported.operators


@pytest.mark.parametrize("batch", [1, 5])
def test_batch_is_dynamic(residual, tools, images, tmp_path, batch):
    path = tmp_path / "n.onnx"
    write_view(residual, [(2, 3, 15, 15)], path)
    whole, _ = tools.run_file(path, images, optimize=True)
    part, _ = tools.run_file(path, images[:batch], optimize=True)
    assert part.shape == (batch, 5)
    np.testing.assert_array_equal(part, whole[:batch])


def test_file_says_what_it_is(residual, tmp_path):
    write_view(residual, [(1, 3, 15, 15)], tmp_path / "n.onnx", pack="int8")
    model = onnx.load(tmp_path / "n.onnx")
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["flavor"] == "ort" and properties["opset"] == "17"
    assert '"conv3": 2' in properties["weight_bits"] and '"fc": 8' in properties["input_bits"]
    assert model.producer_name == "qkd-toolkit"
    assert [entry.name for entry in model.graph.input] == ["images"]
    assert [entry.name for entry in model.graph.output] == ["logits"]
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param == "batch" and [dim.dim_value for dim in shape[1:]] == [3, 15, 15]
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and {"conv1", "sum", "pool", "fc"} <= set(names)


@pytest.mark.parametrize("name", ["images", "logits", "fc.weight.int8"])
def test_names_of_the_student_may_collide_with_names_of_the_graph(net, tools, images, tmp_path, name):
    net.image()
    net.quantize(net.conv("image", name, (3, 4)), "q", 8, 0.5, -128)
    assert_equal(tools, net.view("q"), tmp_path / "n.onnx", images)


def test_output_on_a_grid_that_is_read_elsewhere_too(net, tools, images, tmp_path):
    net.quantize(net.conv(net.image(), "c", (3, 4)), "a", 8, 0.5, -128)
    view = net.view("a", net.quantize(net.conv("a", "d", (4, 2)), "b", 4, 4.0))
    write_view(view, [images.shape], tmp_path / "n.onnx")
    wanted = tools.reference(view, images)
    first, second = open_session(tmp_path / "n.onnx", optimize=True).run(["logits", "logits_2"], {"images": images})
    np.testing.assert_array_equal(first, wanted["a"] * 0.5)
    np.testing.assert_array_equal(second, wanted["b"] * 4.0)


def test_unknown_function_names_the_layer(net, images, tmp_path):
    net.image()
    net.real(Function("body.act", ("image",), "f", op="swirl"))
    with pytest.raises(ExportError, match=r"body\.act: no ONNX form is known for 'swirl'"):
        write_view(net.view("f"), [images.shape], tmp_path / "n.onnx")


def test_unknown_move_names_the_layer(net, images, tmp_path):
    net.shape(net.image(), "m", "twist")
    with pytest.raises(ExportError, match="m: no ONNX form is known for 'twist'"):
        write_view(net.view("m"), [images.shape], tmp_path / "n.onnx")


def test_shapes_that_do_not_fit_are_found_before_writing(net, images, tmp_path):
    net.conv(net.image(), "c", (5, 4))  # the image has three channels
    with pytest.raises(ExportError, match="refuses the graph.*kernel channels"):
        write_view(net.view(net.quantize("c", "a", 8, 1.0)), [images.shape], tmp_path / "n.onnx")
    assert not list(tmp_path.iterdir())


def test_grid_of_two_bits_needs_a_clip_and_of_eight_none(net, images, tmp_path):
    net.quantize(net.conv(net.image(), "c", (3, 4)), "a", 2, 0.5)
    net.quantize(net.conv("a", "d", (4, 4)), "b", 8, 0.5)
    exported = write_view(net.view("b"), [images.shape], tmp_path / "n.onnx")
    assert exported.operators_in_file["Clip"] == 1
    assert Grid(0.5, 0, 3).zero_point == 0
