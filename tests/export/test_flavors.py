"""Every flavor computes the integers of the view, each run by a runtime that reads it."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from export import ExportError, ParityError, check_parity, export_onnx, write_view
from export.parity.quant_session import QuantSession, runtime_readable_models
from export.runtime import open_session
from quantizers import QuantSpec, calibrate, integer_view, prepare
from quantizers.integer import Function

FLAVORS = ("ort", "qcdq", "qonnx")
SHAPE = (2, 3, 15, 15)


def needs_qonnx() -> None:
    pytest.importorskip("qonnx", reason="qonnx's executor is in the extra [qonnx], for Python 3.11 and newer")


@pytest.fixture
def flavor(request):
    if request.param == "qonnx":
        needs_qonnx()
    return request.param


each_flavor = pytest.mark.parametrize("flavor", FLAVORS, indirect=True)


def taps_of(path) -> list[dict[str, Any]]:
    return json.loads(next(entry.value for entry in onnx.load(path).metadata_props if entry.key == "quantizers"))


def run_taps(path, images: np.ndarray, *, optimize: bool = False) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the logits and the codes by quantizer of a file whose grids are real tensors."""
    taps = taps_of(path)
    assert {tap["type"] for tap in taps} == {"FLOAT"}
    names = list(dict.fromkeys(tap["tensor"] for tap in taps))
    model = onnx.load(path)
    if "qonnx" in {entry.value for entry in model.metadata_props}:
        session: Any = QuantSession(path)
    else:
        for name in names:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        session = open_session(model.SerializeToString(), optimize=optimize)
    logits, *found = session.run(["logits", *names], {"images": images})
    values = dict(zip(names, found, strict=True))
    return logits, {tap["name"]: values[tap["tensor"]] / tap["scale"] for tap in taps}


def assert_same(view, tools, images, logits, codes) -> None:
    wanted = tools.reference(view, images)
    np.testing.assert_array_equal(logits, wanted[view.outputs[0]].astype(np.float32))
    assert np.unique(logits).size >= 5
    outputs = {node.name: node.output for node in view.nodes}
    for name, found in codes.items():
        np.testing.assert_array_equal(found, wanted[outputs[name]], err_msg=name)
    assert codes and all(np.unique(found).size > 1 for found in codes.values())


@pytest.mark.parametrize("optimize", [False, True])
def test_qcdq_in_onnx_runtime(residual, tools, images, tmp_path, optimize):
    exported = write_view(residual, [SHAPE], tmp_path / "n.onnx", flavor="qcdq", strict=True)
    assert exported.warnings == () and exported.opset == 13 and not exported.packed
    assert_same(residual, tools, images, *run_taps(tmp_path / "n.onnx", images, optimize=optimize))


def test_qcdq_has_plain_operators_only_and_int8_weights(residual, tmp_path):
    exported = write_view(residual, [SHAPE], tmp_path / "n.onnx", flavor="qcdq")
    model = onnx.load(tmp_path / "n.onnx")
    assert [entry.domain for entry in model.opset_import] == [""]
    counts = exported.operators_in_file
    assert counts["Clip"] == 4  # the three grids below eight bits, and the concatenation of two of them
    assert "Cast" not in counts and counts["QuantizeLinear"] == 10 + 1
    kinds = {node.name: node.op_type for node in model.graph.node}
    quantized = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    tensors = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    assert all(tensors[node.input[2]] == 0 for node in quantized)  # signed: int8, unsigned: uint8
    assert {str(tensors[node.input[2]].dtype) for node in quantized} == {"int8", "uint8"}
    assert {layer.storage for layer in exported.layers} == {"int8"} and kinds["conv3"] == "Conv"
    steps = tensors["fc.bias"] / (residual.grids["a6"].scale * residual.nodes[-1].weight_scale)
    np.testing.assert_array_equal(steps, residual.nodes[-1].bias)


@pytest.mark.parametrize("is_shifted", [False, True])
def test_qcdq_has_one_kind_of_codes_where_a_grid_is_shifted(net, tools, images, tmp_path, is_shifted):
    """ONNX Runtime on x86 computes int8 codes that are clipped in float, as in a linear bottleneck."""
    net.quantize(net.conv(net.image(), "narrow", (3, 4)), "bottle", 4, 0.5, -8)
    net.quantize(net.conv("bottle", "wide", (4, 6)), "a", 4, 0.5, -5 if is_shifted else 0)
    net.quantize(net.conv("a", "again", (6, 4)), "b", 4, 0.5, -8)
    view = net.view(net.conv("b", "last", (4, 4)))
    exported = write_view(view, [images.shape], tmp_path / "n.onnx", flavor="qcdq")
    model = onnx.load(tmp_path / "n.onnx")
    tensors = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    zeros = [tensors[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    if not is_shifted:
        assert not any(zeros) and {str(zero.dtype) for zero in zeros} == {"int8", "uint8"}
    else:
        assert all(zeros) and {str(zero.dtype) for zero in zeros} == {"uint8"}
        if tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 21):  # 1.20 computes the same codes in float
            assert exported.operators["QLinearConv"] == 3  # all but the last, whose output is real
    assert_same(view, tools, images, *run_taps(tmp_path / "n.onnx", images))


@pytest.mark.parametrize("opset", [19, 21])  # the reference evaluator has no older DequantizeLinear
def test_qcdq_in_onnx_s_reference_evaluator(residual, tools, images, tmp_path, opset):
    write_view(residual, [SHAPE], tmp_path / "n.onnx", flavor="qcdq", opset=opset)
    logits = ReferenceEvaluator(str(tmp_path / "n.onnx")).run(None, {"images": images})[0]
    np.testing.assert_array_equal(logits, tools.reference(residual, images)["fc"].astype(np.float32))


@pytest.mark.parametrize("batch", [1, 5])
def test_qonnx_in_its_own_executor(residual, tools, images, tmp_path, batch):
    needs_qonnx()
    exported = write_view(residual, [SHAPE], tmp_path / "n.onnx", flavor="qonnx", strict=True)
    assert exported.operators["Quant"] == 10 + 6 + 6  # grids, weights, biases
    assert [warning.split(":")[0] for warning in exported.warnings] == ["not loaded"] and not exported.fall_backs
    assert_same(residual, tools, images[:batch], *run_taps(tmp_path / "n.onnx", images[:batch]))


def test_qonnx_file_says_widths_and_shapes(residual, tmp_path):
    write_view(residual, [SHAPE], tmp_path / "n.onnx", flavor="qonnx")
    model = onnx.load(tmp_path / "n.onnx")
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 13, "qonnx.custom_op.general": 1}
    quants = {node.name: node for node in model.graph.node if node.op_type == "Quant"}
    tensors = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    bits = {name: float(tensors[node.input[3]]) for name, node in quants.items()}
    assert bits["conv3.weight.quant"] == 2 and bits["conv2.weight.quant"] == 3 and bits["conv3.bias.quant"] == 32
    assert bits["a1_quant"] == 4 and bits["image_quant"] == 8
    signs = {name: next(a.i for a in node.attribute if a.name == "signed") for name, node in quants.items()}
    assert signs["image_quant"] == 1 and signs["a1_quant"] == 0 and signs["conv3.bias.quant"] == 1
    assert tensors[quants["conv3.weight.quant"].input[1]].shape == (8, 1, 1, 1)
    assert all(tensors[node.input[place]].shape == () for node in quants.values() for place in (2, 3))
    shapes = {entry.name for entry in model.graph.value_info}
    made = {name for node in model.graph.node for name in node.output}
    assert made <= shapes | {"logits"}
    assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 15, 15]


def test_qonnx_s_transformations_run_through(residual, tools, images, tmp_path):
    needs_qonnx()
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.fold_constants import FoldConstants
    from qonnx.transformation.general import GiveUniqueNodeNames
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.transformation.infer_shapes import InferShapes
    from qonnx.util.cleanup import cleanup_model

    write_view(residual, [SHAPE], tmp_path / "n.onnx", flavor="qonnx")
    wanted = tools.reference(residual, images[:1])["fc"].astype(np.float32)
    model = ModelWrapper(str(tmp_path / "n.onnx"))
    with runtime_readable_models():
        for step in (
            InferShapes(), FoldConstants(), GiveUniqueNodeNames(), InferDataTypes(allow_scaledint_dtypes=True)
        ):  # fmt: skip
            model = model.transform(step)
        np.testing.assert_array_equal(execute_onnx(model, {"images": images[:1]})["logits"], wanted)
        types = [str(model.get_tensor_datatype(node.output[0])) for node in model.get_nodes_by_op_type("Quant")]
        cleaned = cleanup_model(model)
        found = execute_onnx(cleaned, {cleaned.graph.input[0].name: images[:1]})
    np.testing.assert_array_equal(next(iter(found.values())), wanted)
    assert {f"SCALEDINT<{bits}>" for bits in (2, 3, 4, 8)} <= set(types)


def test_without_qonnx_the_error_says_what_to_install(residual, tmp_path, monkeypatch):
    write_view(residual, [SHAPE], tmp_path / "n.onnx", flavor="qonnx")
    monkeypatch.setitem(sys.modules, "qonnx", None)
    monkeypatch.setitem(sys.modules, "qonnx.core", None)
    monkeypatch.setitem(sys.modules, "qonnx.core.onnx_exec", None)
    with pytest.raises(ImportError, match=r"qonnx's executor, which is missing: pip install 'qkd-toolkit\[qonnx\]'"):
        check_parity(nn.Identity(), tmp_path / "n.onnx", [torch.ones(1, 3, 15, 15)])


def test_qonnx_says_what_it_cannot_run(residual, images, tmp_path):
    needs_qonnx()
    write_view(residual, [SHAPE], tmp_path / "n.onnx", flavor="qonnx")
    with pytest.raises(ValueError, match="qonnx cannot run the graph: .*[Ss]hape mismatch"):
        QuantSession(tmp_path / "n.onnx").run(["logits"], {"images": images[:, :, :7]})
    with pytest.raises(ValueError, match=r"n\.onnx: it is not an ONNX file, or it is damaged"):
        (tmp_path / "n.onnx").write_bytes(b"\xff\xff\xff")
        QuantSession(tmp_path / "n.onnx")


@pytest.mark.parametrize(
    ("flavor", "warning"),
    [("qcdq", "have a zero point, which some runtimes do not support: a_quant, b_quant"),
     ("qonnx", "are shifted, and so declared wider than their grids: a_quant, b_quant")],
    indirect=["flavor"],
)  # fmt: skip
def test_shifted_grids(net, tools, images, tmp_path, flavor, warning):
    net.quantize(net.conv(net.image(), "c", (3, 4)), "a", 8, 0.5, -100)
    net.quantize(net.conv("a", "d", (4, 4)), "b", 4, 0.5, -5)  # an odd shift, and sums on ties
    view = net.view(net.conv("b", "e", (4, 4)))
    exported = write_view(view, [images.shape], tmp_path / "n.onnx", flavor=flavor)
    assert any(line.endswith(warning) for line in exported.warnings)
    logits, codes = run_taps(tmp_path / "n.onnx", images)
    assert_same(view, tools, images, logits, codes)
    assert (codes["b_quant"].min(), codes["b_quant"].max()) == (-5, 10)
    if flavor == "qonnx":
        model = onnx.load(tmp_path / "n.onnx")
        tensors = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
        quants = {node.name: node for node in model.graph.node if node.op_type == "Quant"}
        assert all(tensors[node.input[2]] == 0 for node in quants.values())
        assert tensors[quants["a_quant"].input[3]] == 9 and tensors[quants["b_quant"].input[3]] == 5


@pytest.mark.parametrize("flavor", ["qcdq", "qonnx"], indirect=True)
def test_values_next_to_a_tie_keep_their_side_on_shifted_grids(net, tools, tmp_path, flavor):
    """Added before rounding, a zero point of 140 would lose the bit that decides."""
    net.quantize("x", "image", 8, 1.0, -141)
    below, above = (np.nextafter(np.float32(0.5), np.float32(end)) for end in (0, 1))
    images = np.zeros((1, 3, 15, 15), np.float32)
    images[0, 0, 0, :6] = [below, above, -below, -above, 0.5, 1.5]
    images[0, 1] = np.arange(-300, 300, 600 / 225, dtype=np.float32).reshape(15, 15)
    view = net.view(net.conv("image", "c", (3, 4)))
    write_view(view, [images.shape], tmp_path / "n.onnx", flavor=flavor)
    logits, codes = run_taps(tmp_path / "n.onnx", images)
    assert codes["image_quant"][0, 0, 0, :6].tolist() == [0, 1, 0, -1, 0, 2]
    assert_same(view, tools, images, logits, codes)


@pytest.mark.parametrize("flavor", ["qcdq", "qonnx"], indirect=True)
def test_moves_and_padding_on_real_values(net, tools, images, tmp_path, flavor):
    net.image(4)
    net.shape("image", "padded", "pad", before=(0, 0, 1, 0), after=(0, 0, 2, 1))
    net.shape("padded", "turned", "transpose", perm=(0, 1, 3, 2))
    net.shape("turned", "cut", "slice", axis=2, start=1, end=14)
    net.shape("cut", "picked", "gather", axis=3, indices=[0, 2, 2, 5])
    net.quantize("picked", "low", 2, 1 / 4, -2)
    net.shape("low", "flat", "reshape", shape=(-1, 3 * 13 * 4))
    view = net.view(net.linear("flat", "fc", (156, 7)))
    write_view(view, [images.shape], tmp_path / "n.onnx", flavor=flavor)
    assert_same(view, tools, images, *run_taps(tmp_path / "n.onnx", images))


@pytest.mark.parametrize("flavor", ["qcdq", "qonnx"], indirect=True)
def test_functions_and_their_opset(net, images, tmp_path, flavor):
    net.real(Function("f", (net.image(),), "f", op="hardswish"))
    exported = write_view(net.view("f"), [images.shape], tmp_path / "n.onnx", flavor=flavor)
    assert exported.opset == 14
    session = QuantSession(tmp_path / "n.onnx") if flavor == "qonnx" else open_session(
        tmp_path / "n.onnx", optimize=False
    )  # fmt: skip
    real = torch.tensor(np.clip(np.rint(images * 16), -128, 127) / 16).float()
    found = session.run(["logits"], {"images": images})[0]
    np.testing.assert_allclose(found, nn.functional.hardswish(real).numpy(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("flavor", ["qcdq", "qonnx"])
def test_strict_names_a_layer_that_reads_values_on_no_grid(net, tmp_path, flavor):
    from quantizers.integer import Add

    net.quantize(net.conv(net.image(), "c", (3, 4)), "a", 8, 0.5, -128)
    net.real(Add("sum", ("c", "a"), "sum"))
    view = net.view(net.quantize("sum", "s", 8, 0.5, -128))
    exported = write_view(view, [SHAPE], tmp_path / "n.onnx", flavor=flavor)
    assert exported.fall_backs == ("sum (Add) computes in float: an input is not quantized (c)",)
    assert exported.fall_backs[0] in exported.warnings
    with pytest.raises(ExportError, match=r"layers stay in float:\n  sum \(Add\)"):
        write_view(view, [SHAPE], tmp_path / "strict.onnx", flavor=flavor, strict=True)
    assert not (tmp_path / "strict.onnx").exists()


class Everything(nn.Module):
    """Residual sum, depthwise and strided convolution, concatenation, both poolings, linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self.block(3, 8)
        self.body = nn.Sequential(self.block(8, 8), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.depthwise = self.block(8, 8, groups=8, stride=2)
        self.left, self.right = self.block(8, 4, kernel=1), self.block(8, 6)
        self.max, self.mean = nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(2)
        self.relu, self.last = nn.ReLU(), self.block(10, 8)
        self.head = nn.Linear(8, 6)

    @staticmethod
    def block(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x):
        x = self.stem(x)
        x = self.relu(x + self.body(x))
        x = self.max(self.depthwise(x))
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = self.last(self.mean(x))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def batches(seed: int, size: int = 13, count: int = 2, batch: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    colors = [2 * torch.randn(batch, 3, 1, 1, generator=generator) for _ in range(count)]
    return [color + torch.randn(batch, 3, size, size, generator=generator) for color in colors]


def make_student(bits: int = 4, change=None, size: int = 13):
    torch.manual_seed(0)
    model = Everything()
    with torch.no_grad():
        for batch in batches(1, size):
            model(batch)  # running statistics
        if change is not None:
            change(model)
    student = prepare(model, QuantSpec(weight_bits=bits, act_bits=bits), example_inputs=batches(1, size)[0])
    calibrate(student, batches(1, size))
    return student.eval()


@pytest.fixture(scope="module", params=[2, 4], ids=["w2a2", "w4a4"])
def student(request):
    return make_student(request.param)


def assert_parity(student, path, images, *, layers: bool = True):
    report = check_parity(student, path, images)
    assert report.off.differing == 0 and report.on.top1_agreement >= 0.9
    assert report.off.max_steps is not None and report.off.max_steps < 0.5
    assert len(report.layers) >= 8 or not layers
    assert [layer for layer in report.layers if layer.differing] == []
    return report


@each_flavor
def test_student_and_file_agree(student, tmp_path, flavor):
    exported = export_onnx(student, batches(1)[0], tmp_path / "n.onnx", flavor=flavor, strict=True)
    assert exported.flavor == flavor
    report = assert_parity(student, tmp_path / "n.onnx", batches(2))
    assert report.predicted_classes > 1 and report.layer_images == 24
    assert report.runtime_version.startswith("qonnx ") == (flavor == "qonnx")
    assert any("`on` repeats `off`" in note for note in report.notes) == (flavor == "qonnx")


@pytest.mark.parametrize(
    ("flavor", "weight"),
    [("ort", "last.0.weight.int8"), ("qcdq", "last.0.weight.int8"), ("qonnx", "last.0.weight.float")],
    indirect=["flavor"],
)
def test_an_altered_weight_is_found(student, tmp_path, flavor, weight):
    export_onnx(student, batches(1)[0], tmp_path / "n.onnx", flavor=flavor, pack="int8")
    model = onnx.load(tmp_path / "n.onnx")
    tensor = next(entry for entry in model.graph.initializer if entry.name == weight)
    tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), weight))
    onnx.save(model, tmp_path / "n.onnx")
    report = check_parity(student, tmp_path / "n.onnx", batches(2))
    differing = [layer.name for layer in report.layers if layer.differing]
    assert differing[0] == report.layers[-2].name  # behind the altered layer; the one before its mean
    with pytest.raises(ParityError, match=f"first layer that differs is {differing[0]}"):
        report.raise_if_worse()


def negative_factors(model) -> None:
    model.stem[1].weight[::2] *= -1
    model.depthwise[1].weight[1::2] *= -1


def dead_channels(model) -> None:
    model.stem[1].weight[3] = 0
    model.left[0].weight[1] = 0
    model.last[1].weight[:2] = 1e-8
    model.head.weight[2] = 0


@each_flavor
@pytest.mark.parametrize("change", [negative_factors, dead_channels])
def test_odd_batch_norms(tmp_path, flavor, change):
    student = make_student(4, change)
    export_onnx(student, batches(1)[0], tmp_path / "n.onnx", flavor=flavor)
    assert_parity(student, tmp_path / "n.onnx", batches(2))


@each_flavor
@pytest.mark.parametrize("size", [7, 11])
def test_odd_sizes_and_a_batch_of_one(tmp_path, flavor, size):
    student = make_student(4, size=size)
    export_onnx(student, batches(1, size)[0][:1], tmp_path / "n.onnx", flavor=flavor)
    images = [images[start : start + 1] for images in batches(2, size, count=1) for start in range(6)]
    assert assert_parity(student, tmp_path / "n.onnx", images).images == 6


def far_biases(model) -> None:
    """Give channels next to no size, and a bias that would be 1e15 of their steps."""
    model.last[1].weight[1:3] = 1e-12
    model.last[1].bias[1:3] = torch.tensor([0.8, -0.8])


@each_flavor
def test_a_bias_far_beyond_its_channel_s_size_is_kept_in_int32(tmp_path, flavor):
    student = make_student(4, far_biases)
    export_onnx(student, batches(1)[0], tmp_path / "n.onnx", flavor=flavor)
    layer = next(node for node in integer_view(student).nodes if node.name == "last.0")
    assert 2**28 < np.abs(layer.bias.astype(np.int64)).max() < 2**31
    assert_parity(student, tmp_path / "n.onnx", batches(2))


@pytest.mark.parametrize("flavor", FLAVORS)
def test_diverged_weights_are_refused_by_name(tmp_path, flavor):
    student = make_student(4)
    with torch.no_grad():
        dict(student.named_modules())["last.0"].bn.bias[1] = float("inf")
    with pytest.raises(ValueError, match=r"last\.0: a (weight scale|bias)"):
        export_onnx(student, batches(1)[0], tmp_path / "n.onnx", flavor=flavor)
    assert not list(tmp_path.iterdir())
