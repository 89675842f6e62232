"""Each target's file is the student in ONNX Runtime, and has the form that its runtime computes exactly."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from export import ExportError, check_parity, export_onnx, write_view
from export.storage.metadata import properties_of
from export.targets import TARGETS, find_target
from export.targets.rewrites import REWRITES
from quantizers import QuantSpec, Student, calibrate, integer_view, prepare
from quantizers.integer import Quantize

pytestmark = pytest.mark.usefixtures("eager")
OFFERED = [name for name, target in TARGETS.items() if not target.refusal and target.flavor != "qonnx"]


class Small(nn.Module):
    """A sum of two layers, a mean with its own grid, and two linear layers without a bias that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.side = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1)
        self.pool, self.flat = nn.AvgPool2d(2), nn.Flatten()
        self.first, self.second, self.last = nn.Linear(64, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 3)
        nn.init.zeros_(self.first.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.flat(self.pool(self.act(x + self.side(x))))
        return self.last(self.act(self.second(self.act(self.first(x)))))


class Joined(nn.Module):
    """A sum on 8 bits whose value is put on the grid of a concatenation: two quantizers follow each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.p = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.PReLU(8)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        y = torch.relu(x + self.b(x))
        return self.fc(torch.cat([y, self.p(x)], 1).mean((2, 3)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(24, 2, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def student(eager: None, images: Tensor) -> Student:
    torch.manual_seed(0)
    made = prepare(Small().eval(), QuantSpec(weight_bits=4, act_bits=4), images[:2])
    calibrate(made, images)
    return made.eval()


def read(student: Student, images: Tensor, path: Path, target: str) -> onnx.ModelProto:
    return onnx.load(export_onnx(student, images[:2], path / "student.onnx", target=target).path)


@pytest.mark.parametrize("target", [*OFFERED, "onnxruntime>=1.17"])
def test_the_file_is_the_student(student: Student, images: Tensor, tmp_path: Path, target: str) -> None:
    exported = export_onnx(student, images[:2], tmp_path / "student.onnx", target=target)
    report = check_parity(student, exported.path, [images])
    assert report.faults == () and report.constants > 20
    model = onnx.load(exported.path)
    assert properties_of(model)["target"] == target == find_target(target).name
    assert exported.flavor == find_target(target).flavor and exported.needs
    if not find_target(target).is_onnxruntime:
        assert exported.needs.startswith(f"{target} (tried with ")


def test_a_missing_rewrite_is_a_difference(student: Student, images: Tensor, tmp_path: Path) -> None:
    path = export_onnx(student, images[:2], tmp_path / "plain.onnx", pack="int8", linear="gemm").path
    model = onnx.load(path)
    model.metadata_props.append(onnx.StringStringEntryProto(key="target", value="openvino"))
    onnx.save(model, path)
    assert any("MaxPool" in fault or ".apart" in fault for fault in check_parity(student, path, [images]).faults)


def test_openvino_has_a_pooling_between_convolutions_and_sums(student: Student, images: Tensor, tmp_path: Path) -> None:
    model = read(student, images, tmp_path, "openvino")
    poolings = [node for node in model.graph.node if node.op_type == "MaxPool"]
    makers = {name: node for node in model.graph.node for name in node.output}
    readers = {name: node for node in model.graph.node for name in node.input}
    assert poolings and all(list(node.attribute[0].ints) == [1, 1] for node in poolings)
    for node in poolings:
        made = makers[node.input[0]]
        made = makers[made.input[0]] if made.op_type == "Clip" else made
        assert makers[made.input[0]].op_type == "Conv"
        assert readers[readers[node.output[0]].output[0]].op_type == "Add"


def test_openvino_has_no_linear_layer_without_a_bias(student: Student, images: Tensor, tmp_path: Path) -> None:
    plain = onnx.load(export_onnx(student, images[:2], tmp_path / "plain.onnx").path)
    assert sorted(len(node.input) for node in plain.graph.node if node.op_type == "Gemm") == [2, 3, 3]
    model = read(student, images, tmp_path, "openvino")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type == "Gemm"]
    tiny = [constants[node.input[2]] for node in layers if node.input[2] in constants]
    assert len(layers) == 3 and len(tiny) == 2
    assert all(values[0] == np.float32(1e-30) and not values[1:].any() for values in tiny)


@pytest.mark.parametrize(("target", "padded"), [("openvino", ["deep", "point"]), ("opencv", ["point"]), ("tvm", [])])
def test_wide_paddings_are_nodes_where_a_runtime_computes_them_wrongly(
    target: str, padded: list[str], tmp_path: Path
) -> None:
    """OpenVINO with one input channel, OpenCV with single pixels; other paddings stay in their convolutions."""
    torch.manual_seed(0)
    images = torch.randn(16, 1, 8, 8)
    deep = nn.Conv2d(4, 4, (3, 5), 2, padding=(4, 3), dilation=(1, 2))
    net = nn.Sequential(OrderedDict(
        same=nn.Conv2d(1, 4, 3, padding=1), act=nn.ReLU(), deep=deep, act2=nn.ReLU(),
        point=nn.Conv2d(4, 8, 1, padding=1), act3=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(),
        last=nn.Linear(8, 3),
    ))  # fmt: skip
    made = prepare(net.eval(), QuantSpec(weight_bits=4, act_bits=4), images[:2])
    calibrate(made, images)
    model = read(made.eval(), images, tmp_path, target)
    report = check_parity(made, tmp_path / "student.onnx", images)
    assert report.faults == () and report.whole_differs_on == 0
    pads = {node.name: list(next(one.ints for one in node.attribute if one.name == "pads"))
            for node in model.graph.node if node.op_type == "Conv"}  # fmt: skip
    names = [node.name.removesuffix(".padded") for node in model.graph.node if node.op_type == "Pad"]
    assert names == padded
    assert pads["same"] == [1, 1, 1, 1]
    assert pads["deep"] == ([2, 3, 2, 3] if "deep" in padded else [4, 3, 4, 3])
    assert pads["point"] == ([0, 0, 0, 0] if "point" in padded else [1, 1, 1, 1])


def test_iree_has_no_clip_of_all_codes(net: Any, tmp_path: Path) -> None:
    def limits(flavor: str, target: str | None) -> list[int]:
        path = write_view(view, [(1, 3, 6, 6)], tmp_path / "student.onnx", flavor=flavor, target=target).path
        model = onnx.load(path)
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        ends = [[constants[name] for name in node.input[1:]] for node in model.graph.node if node.op_type == "Clip"]
        return sorted(int(high) - int(low) for low, high in ends)

    net.quantize(net.conv(net.image(), "conv", (3, 4), bits=8), "wide", 8, 1 / 8)
    net.quantize("wide", "other", 8, 1 / 16)  # a change of grid at eight bits
    net.quantize(net.conv("other", "conv2", (4, 4), bits=8), "narrow", 4, 1 / 8)
    view = net.view(net.conv("narrow", "conv3", (4, 2)))
    assert limits("qcdq", None) == [15, 255] and limits("ort", "iree") == [15]


@pytest.mark.parametrize("bits", [2, 8])
def test_iree_keeps_quantizers_apart_that_follow_each_other(bits: int, tmp_path: Path) -> None:
    """ONNX Runtime joins two grids into one with another scale; no kernel by itself shows it."""
    torch.manual_seed(1)
    images = torch.randn(32, 3, 10, 14)
    student = prepare(Joined().eval(), QuantSpec(weight_bits=bits, act_bits=bits), images[:2])
    calibrate(student, images)
    model = read(student.eval(), images, tmp_path, "iree")
    report = check_parity(student, tmp_path / "student.onnx", images)
    assert report.faults == () and report.whole_differs_on == 0
    apart = next(node for node in model.graph.node if node.op_type == "Max")
    reader = next(node for node in model.graph.node if apart.output[0] in node.input)
    reader.input[0] = apart.input[0]
    model.graph.node.remove(apart)
    onnx.save(model, tmp_path / "joined.onnx")
    report = check_parity(student, tmp_path / "joined.onnx", images, constants=False)
    assert not any(layer.differing_on for layer in report.layers) and report.off.beyond == 0
    assert bits == 2 or any("the runtime rewrites the graph across layers" in fault for fault in report.faults)


def test_opencv_has_constant_biases_of_linear_layers(student: Student, images: Tensor, tmp_path: Path) -> None:
    model = read(student, images, tmp_path, "opencv")
    constants = {tensor.name for tensor in model.graph.initializer}
    assert all(set(node.input[2:]) <= constants for node in model.graph.node if node.op_type == "Gemm")


@pytest.mark.parametrize(("size", "clipped"), [(8, []), (7, [0]), (6, [0, 2]), (1, [0, 2])])
def test_opencv_computes_pointwise_convolutions_of_few_pixels_in_float(
    size: int, clipped: list[int], tmp_path: Path
) -> None:
    """Its kernel for codes is right if the number of pixels is a multiple of 16: 8x8 and 4x4 here."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1, 2)]
    net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.ReLU(), layers[3])
    images = torch.randn(8, 2, size, size)
    student = prepare(net.eval(), QuantSpec(weight_bits=4, act_bits=4), images[:2])
    calibrate(student, images)
    path = export_onnx(student.eval(), images[:2], tmp_path / "student.onnx", target="opencv").path
    assert check_parity(student, path, [images]).faults == ()
    nodes = onnx.load(path).graph.node
    readers = {name: node.op_type for node in nodes for name in node.input}
    convs = [node for node in nodes if node.op_type == "Conv"]
    assert [place for place, node in enumerate(convs) if readers.get(node.output[0]) == "Clip"] == clipped


@pytest.mark.parametrize(("groups", "padding", "is_signed", "is_clipped"),
                         [(4, 1, True, True), (2, 1, True, True), (4, 0, True, False), (1, 1, True, False),
                          (4, 1, False, False)])  # fmt: skip
def test_opencv_computes_padded_depthwise_convolutions_of_a_shifted_grid_in_float(
    groups: int, padding: int, *, is_signed: bool, is_clipped: bool, tmp_path: Path
) -> None:
    """Its kernel for codes gets the last pixels wrong in planes of 6x6 and 7x7, among others."""
    torch.manual_seed(0)
    between = nn.Hardswish() if is_signed else nn.ReLU()
    layer = nn.Conv2d(4, 4, 3, padding=padding, groups=groups)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), between, layer, nn.ReLU())
    images = torch.randn(8, 2, 6, 6)
    student = prepare(net.eval(), QuantSpec(weight_bits=4, act_bits=4), images[:2])
    calibrate(student, images)
    path = export_onnx(student.eval(), images[:2], tmp_path / "student.onnx", target="opencv").path
    assert check_parity(student, path, [images]).faults == ()
    nodes = onnx.load(path).graph.node
    conv = [node for node in nodes if node.op_type == "Conv"][1]
    readers = {name: node.op_type for node in nodes for name in node.input}
    assert (readers.get(conv.output[0]) == "Clip") == is_clipped


@pytest.mark.parametrize(
    ("version", "opset", "types"), [("1.17", 17, set()), ("1.23", 21, {"INT4"}), ("1.24.1", 25, {"INT2", "INT4"})]
)
def test_a_version_decides_the_storage(
    images: Tensor, tmp_path: Path, version: str, opset: int, types: set[str]
) -> None:
    student = prepare(Small().eval(), QuantSpec(weight_bits=2, overrides={"side": {"weight_bits": 4}}), images[:2])
    calibrate(student, images)
    model = read(student, images, tmp_path, f"onnxruntime>={version}")
    stored = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}
    assert stored & {"INT2", "INT4"} == types and model.opset_import[0].version == opset


@pytest.mark.parametrize(("version", "first"), [("1.17", "1.21"), ("1.22", "1.22")])
def test_versions_that_compute_wrongly_are_named(
    student: Student, images: Tensor, tmp_path: Path, version: str, first: str
) -> None:
    """They do so on processors with AMX, in layers whose width is not a multiple of 16."""
    target = f"onnxruntime>={version}"
    said = export_onnx(student, images[:2], tmp_path / "student.onnx", target=target).warnings
    (note,) = [line for line in said if "26324" in line]
    assert note.startswith(f"onnxruntime {first} to 1.24 ") and "use 1.25 or later" in note
    newer = export_onnx(student, images[:2], tmp_path / "newer.onnx", target="onnxruntime>=1.25")
    assert not any("26324" in line for line in newer.warnings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target": "onnx"}, "must be one of onnxruntime>=1.17, onnxruntime, .* got 'onnx'"),
        ({"target": "onnxruntime>=1.9"}, "onnxruntime 1.9 is too old; files need at least 1.14"),
        ({"target": "iree", "flavor": "qonnx"}, "target 'iree' takes flavor 'qcdq'; leave flavor out, got 'qonnx'"),
        ({"target": "openvino", "pack": "packed"}, "takes weights only as int8; use pack='auto' or 'int8'"),
        ({"target": "opencv", "linear": "matmul_nbits"}, "has no MatMulNBits; use linear='auto' or 'gemm'"),
        ({"target": "onnxruntime>=1.17", "pack": "packed"}, "does not load packed weights"),
        ({"target": "onnxruntime>=1.17", "linear": "matmul_nbits"}, "is slow at MatMulNBits"),
        ({"target": "onnxruntime>=1.17", "opset": 21}, "does not load opset 21"),
    ],
)
def test_contradictions_are_named(
    student: Student, images: Tensor, tmp_path: Path, settings: dict[str, str], words: str
) -> None:
    with pytest.raises(ExportError, match=words):
        export_onnx(student, images[:2], tmp_path / "student.onnx", **settings)
    assert not list(tmp_path.iterdir())


def test_finn_takes_no_zero_points(student: Student, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="x_quant: its codes are .* takes no zero points; train with symmetric grids"):
        export_onnx(student, images[:2], tmp_path / "student.onnx", target="finn")
    symmetric = prepare(Small().eval(), QuantSpec(symmetric=True), images[:2])
    calibrate(symmetric, images)
    model = read(symmetric, images, tmp_path, "finn")
    assert {"Quant"} <= {node.op_type for node in model.graph.node} and properties_of(model)["target"] == "finn"
    assert not [node for node in model.graph.node if node.op_type == "Clip"]
    pytest.importorskip("qonnx", reason="qonnx's executor is in the extra [qonnx], for Python 3.11 and newer")
    assert check_parity(symmetric, tmp_path / "student.onnx", [images[:4]]).faults == ()


@pytest.mark.parametrize(
    ("target", "function", "words"),
    [
        ("openvino", nn.Hardtanh(-0.5, 0.8), "does not compute hardtanh exactly"),
        ("opencv", nn.Sigmoid(), "does not compute sigmoid exactly"),
        ("opencv", nn.GELU(approximate="tanh"), "does not compute gelu_tanh exactly"),
        ("opencv", nn.ConstantPad2d(1, 0.0), "does not compute signed_pad exactly"),
        ("opencv", nn.ConvTranspose2d(4, 4, 2, stride=2), "pad: target 'opencv' does not compute pad_of_6_axes"),
    ],
)
def test_what_a_target_lacks_is_refused_by_name(
    images: Tensor, tmp_path: Path, target: str, function: nn.Module, words: str
) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 1), function, nn.Flatten(), nn.LazyLinear(3))
    net.eval()(images[:2])
    student = prepare(net, QuantSpec(), images[:2])
    calibrate(student, images)
    with pytest.raises(ExportError, match=words):
        export_onnx(student.eval(), images[:2], tmp_path / "student.onnx", target=target)
    export_onnx(student, images[:2], tmp_path / "student.onnx", target="tvm")


def test_every_rewrite_is_used_and_known() -> None:
    assert {name for target in TARGETS.values() for name in target.rewrites} == set(REWRITES)


def test_symmetric_grids_have_no_zero_point(images: Tensor) -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Hardswish(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
    )
    net.eval()(images[:2])
    for symmetric, shifted in ((False, 2), (True, 0)):
        student = prepare(net, QuantSpec(symmetric=symmetric), images[:2])
        calibrate(student, images + 1)
        grids = [node.grid for node in integer_view(student.eval()).nodes if isinstance(node, Quantize)]
        assert sum(grid.low not in (0, -(2 ** (grid.bits - 1))) for grid in grids) == shifted
