"""Files are small, run on integer kernels, and appear whole or not at all."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

import export.models.student
import export.storage.packing
from export import ExportError, export_onnx, write_view
from quantizers import QuantSpec, calibrate, prepare
from quantizers.integer import Conv, Grid, IntegerView, Linear, Quantize

SHAPE = (2, 3, 15, 15)


def with_node(view: IntegerView, name: str, **changes) -> IntegerView:
    nodes = [replace(node, **changes) if node.name == name else node for node in view.nodes]
    assert any(node.name == name for node in nodes)
    return replace(view, nodes=tuple(nodes))


def node_of(view: IntegerView, name: str):
    return next(node for node in view.nodes if node.name == name)


def with_scale(view: IntegerView, edge: str, scale: float) -> IntegerView:
    grid = Grid(scale, view.grids[edge].low, view.grids[edge].high)
    nodes = [replace(n, grid=grid) if isinstance(n, Quantize) and n.output == edge else n for n in view.nodes]
    return replace(view, nodes=tuple(nodes), grids={**view.grids, edge: grid})


def test_everything_runs_on_integer_kernels(residual, tmp_path):
    exported = write_view(residual, [SHAPE], tmp_path / "n.onnx", strict=True)
    assert exported.warnings == ()
    counts = exported.operators
    assert counts["QLinearConv"] == 5
    assert counts["QLinearAdd"] == 2  # the sum, and a change of grid: one integer pass, no pair of float ones
    assert counts["QLinearAveragePool"] == 1
    assert counts["QLinearGlobalAveragePool"] == 1
    assert counts["QGemm"] == 1
    assert counts["QuantizeLinear"] == 1  # of the image
    assert not {"DequantizeLinear", "Conv", "Add", "Gemm", "Cast", "AveragePool", "BatchNormalization"} & set(counts)
    assert [layer.kernel for layer in exported.layers] == ["QLinearConv"] * 5 + ["QGemm"]


def test_report_describes_layers(residual, tmp_path):
    exported = write_view(residual, [SHAPE], tmp_path / "n.onnx", pack="packed")
    storage = {layer.name: (layer.weight_bits, layer.input_bits, layer.storage) for layer in exported.layers}
    assert storage == {
        "conv1": (8, 8, "int8"),
        "left": (4, 4, "int4"),
        "right": (2, 4, "int2"),
        "conv2": (3, 4, "int4"),
        "conv3": (2, 4, "int2"),
        "fc": (8, 8, "int8"),
    }
    conv3 = exported.layers[4]
    assert conv3.weights == 16 * 8 * 9 and conv3.weight_bytes == 16 * 8 * 9 // 4
    assert exported.size_bytes == (tmp_path / "n.onnx").stat().st_size
    assert exported.to_json()["path"] == str(tmp_path / "n.onnx")


@pytest.mark.parametrize(
    ("pack", "opset", "wanted"), [("packed", None, 25), ("packed", 21, 21), ("int8", None, 17), ("auto", None, 25)]
)
def test_opset_follows_from_the_storage(residual, tmp_path, pack, opset, wanted):
    exported = write_view(residual, [SHAPE], tmp_path / "n.onnx", pack=pack, opset=opset)
    assert exported.opset == wanted == onnx.load(tmp_path / "n.onnx").opset_import[0].version
    assert exported.packed == (pack != "int8")
    assert "int2" not in {layer.storage for layer in exported.layers} or wanted == 25


def test_packed_and_plain_files_compute_the_same(residual, tools, images, tmp_path):
    for pack in ("int8", "packed"):
        write_view(residual, [SHAPE], tmp_path / f"{pack}.onnx", pack=pack)
    for optimize in (False, True):
        plain, plain_codes = tools.run_file(tmp_path / "int8.onnx", images, optimize=optimize)
        packed, packed_codes = tools.run_file(tmp_path / "packed.onnx", images, optimize=optimize)
        np.testing.assert_array_equal(plain, packed)
        assert np.unique(plain).size > 5
        for name, codes in plain_codes.items():
            np.testing.assert_array_equal(codes, packed_codes[name])


@pytest.mark.parametrize(("bits", "share"), [(2, 1 / 4), (4, 1 / 2)])
def test_packed_weights_take_their_bits(net, tmp_path, bits, share):
    net.quantize(net.conv(net.image(), "c", (3, 64), bits=bits), "a", 4, 1.0)
    net.quantize(net.conv("a", "d", (64, 64), bits=bits), "b", 4, 1.0)
    sizes = {
        pack: write_view(net.view("b"), [SHAPE], tmp_path / pack, pack=pack).size_bytes for pack in ("int8", "packed")
    }
    weights = 64 * 64 * 9 + 3 * 64 * 9
    assert sizes["int8"] - sizes["packed"] == pytest.approx(weights * (1 - share), rel=0.02)


def test_auto_stores_bytes_where_the_runtime_cannot_unpack(residual, tmp_path, monkeypatch):
    monkeypatch.setattr(export.storage.packing, "runtime_loads", lambda kind: kind.bits != 2)
    exported = write_view(residual, [SHAPE], tmp_path / "a.onnx")
    assert exported.opset == 21 and {layer.storage for layer in exported.layers} == {"int8", "int4"}
    monkeypatch.setattr(export.storage.packing, "runtime_loads", lambda kind: False)
    exported = write_view(residual, [SHAPE], tmp_path / "b.onnx")
    assert exported.opset == 17 and not exported.packed


def test_layers_that_stay_in_float_are_named(net, tmp_path):
    net.conv(net.image(), "body.conv", (3, 4))
    net.quantize("body.conv", "a", 8, 0.5, -128)
    net.quantize("body.conv", "b", 4, 0.25)
    net.quantize(net.conv("a", "left", (4, 4)), "l", 8, 1.0, -128)
    view = net.view("l", net.conv("b", "head", (4, 2)))
    exported = write_view(view, [SHAPE], tmp_path / "n.onnx")
    assert len(exported.warnings) == 2
    assert "body.conv (Conv) runs as Conv in float: its output goes to 2 grids (a_quant, b_quant)" in exported.warnings
    assert "head (Conv) runs as Conv in float: its output is the model's own, and real-valued" in exported.warnings
    with pytest.raises(ExportError, match=r"layers stay in float:\n  body\.conv.*\n  head"):
        write_view(view, [SHAPE], tmp_path / "strict.onnx", strict=True)
    assert not (tmp_path / "strict.onnx").exists()


def test_weights_that_may_saturate_on_x86_get_a_warning(net, tmp_path):
    net.shape(net.image(), "flat", "flatten", axis=1)
    view = net.view(net.linear("flat", "fc", (675, 5)))
    weights = node_of(view, "fc").weights.copy()
    for value, warned in ((64, False), (65, True)):
        weights[0, 0] = value
        exported = write_view(with_node(view, "fc", weights=weights), [SHAPE], tmp_path / "n.onnx")
        assert any("saturate" in warning and warning.startswith("fc") for warning in exported.warnings) == warned


def broken_views() -> dict:
    def bias(view):
        changed = node_of(view, "fc").bias.astype(np.int64)
        changed[3] = 2**31
        return with_node(view, "fc", bias=changed)

    def weight_scale(view, value):
        changed = node_of(view, "left").weight_scale.copy()
        changed[2] = value
        return with_node(view, "left", weight_scale=changed)

    return {
        "bias": (bias, r"fc: bias 2147483648 of channel 3 does not fit int32"),
        "accumulator": (
            lambda v: with_node(v, "fc", bias=np.full(5, 2**31 - 1)), r"fc: the sum of its products and its bias"),
        "bias shape": (lambda v: with_node(v, "fc", bias=np.zeros(4, np.int32)), r"fc: bias must have shape \[5\]"),
        "weights": (
            lambda v: with_node(v, "left", weight_bits=2), r"left: weights -8\.\.7 do not fit 2 bits \(-2\.\.1\)"),
        "weight bits": (lambda v: with_node(v, "left", weight_bits=9), r"left: weight_bits must be 2 to 8, got 9"),
        "negative scale": (lambda v: weight_scale(v, -0.5), r"left: weight scale must be .* got -0\.5 in channel 2"),
        "infinite scale": (lambda v: weight_scale(v, np.inf), r"left: weight scale must be positive and finite"),
        "vanishing bias scale": (lambda v: weight_scale(v, 1e-45), r"left: input scale x weight scale must be"),
        "scale shape": (
            lambda v: with_node(v, "left", weight_scale=np.ones(3, np.float32)),
            r"left: weight_scale must have shape \[1\] or \[8\]",
        ),
        "grid scale": (lambda v: with_scale(v, "a1", 0.0), r"a1: its scale must be positive and finite, got 0\.0"),
        "nan scale": (lambda v: with_scale(v, "a1", float("nan")), r"a1: its scale must be positive"),
        "sum": (lambda v: with_scale(v, "left_q", 0.5), r"sum: both inputs must share one scale, got \[0\.125, 0\.5\]"),
        "concatenation": (lambda v: with_scale(v, "a3", 1.0), r"cat: inputs and output must share one grid"),
        "edge": (lambda v: with_node(v, "conv2", inputs=("no",)), r"conv2: no earlier node makes its input 'no'"),
        "real input": (lambda v: with_node(v, "conv2", inputs=("sum",)), r"conv2: its input 'sum' is not quantized"),
        "output": (lambda v: replace(v, outputs=("nowhere",)), r"no node makes the output 'nowhere'"),
        "wide grid": (
            lambda v: replace(v, grids={**v.grids, "a1": Grid(1.0, 0, 256)}),
            r"a1: its codes 0\.\.256 do not fit eight bits",
        ),
        "grid without zero": (
            lambda v: replace(v, grids={**v.grids, "a1": Grid(1.0, 1, 16)}), r"a1: its codes 1\.\.16 leave out zero"),
    }  # fmt: skip


@pytest.mark.parametrize("flavor", ["ort", "qcdq", "qonnx"])
@pytest.mark.parametrize(("damage", "message"), broken_views().values(), ids=broken_views())
def test_what_cannot_be_represented_is_refused(residual, tmp_path, damage, message, flavor):
    path = tmp_path / "n.onnx"
    path.write_bytes(b"an older file")
    with pytest.raises(ExportError, match=message):
        write_view(damage(residual), [SHAPE], path, flavor=flavor)
    assert path.read_bytes() == b"an older file" and os.listdir(tmp_path) == ["n.onnx"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flavor": "tflite"}, "flavor must be one of ort, qcdq, qonnx, got 'tflite'"),
        ({"flavor": "qcdq", "pack": "packed"}, "flavor 'qcdq' stores weights as int8; use pack='int8' or 'auto'"),
        ({"flavor": "qcdq", "opset": 12}, "opset must be 13 to"),
        ({"flavor": "qonnx", "opset": 12}, "opset must be 13 to"),
        ({"flavor": "qonnx", "pack": "int3"}, "pack must be one of auto, int8, packed, got 'int3'"),
        ({"pack": "int3"}, "pack must be one of auto, int8, packed, got 'int3'"),
        ({"opset": 12}, "opset must be 17 to"),
        ({"opset": 999}, "opset must be 17 to"),
    ],
)
def test_arguments_out_of_range(residual, tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        write_view(residual, [SHAPE], tmp_path / "n.onnx", **options)
    assert not os.listdir(tmp_path)


def test_paths_that_cannot_be_written(residual, tmp_path):
    with pytest.raises(ExportError, match="is a folder"):
        write_view(residual, [SHAPE], tmp_path)
    with pytest.raises(ExportError, match="does not exist; create it first"):
        write_view(residual, [SHAPE], tmp_path / "none" / "n.onnx")
    with pytest.raises(ExportError, match="has 1 inputs, but example_inputs holds 2"):
        write_view(residual, [SHAPE, SHAPE], tmp_path / "n.onnx")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_older_file(residual, tmp_path, monkeypatch, call):
    def fail(*args):
        raise OSError(28, "No space left on device")

    path = tmp_path / "n.onnx"
    path.write_bytes(b"an older file")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ExportError, match=r"cannot write .*n\.onnx: .*No space left"):
        write_view(residual, [SHAPE], path)
    assert path.read_bytes() == b"an older file" and os.listdir(tmp_path) == ["n.onnx"]


def test_working_directory_stays_empty(residual, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    write_view(residual, [SHAPE], tmp_path / "n.onnx")
    assert not os.listdir(here)
    write_view(residual, [SHAPE], "relative.onnx")
    assert os.listdir(here) == ["relative.onnx"]


def test_a_view_alone_is_not_changed(residual, tmp_path):
    before = [(n.weights.copy(), n.bias.copy()) for n in residual.nodes if isinstance(n, (Conv, Linear))]
    nodes, grids = residual.nodes, dict(residual.grids)
    write_view(residual, [SHAPE], tmp_path / "n.onnx")
    after = [(n.weights, n.bias) for n in residual.nodes if isinstance(n, (Conv, Linear))]
    assert residual.nodes is nodes and residual.grids == grids
    for (weights, bias), (new_weights, new_bias) in zip(before, after, strict=True):
        assert (weights == new_weights).all() and (bias == new_bias).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 12, 12), r"is not a batch.*image\[None\]"), ((1, 3, 16, 16), r"prepared for \(3, 12, 12\).*example_inputs=")],
)
def test_images_of_another_size_than_prepared_for_are_refused(tmp_path, shape, message):
    images = torch.randn(2, 3, 12, 12)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1))
    student = prepare(net, QuantSpec(), example_inputs=images)
    calibrate(student, images)
    with pytest.raises(ExportError, match=message):
        export_onnx(student, torch.randn(shape), tmp_path / "student.onnx")
    assert not list(tmp_path.iterdir())
