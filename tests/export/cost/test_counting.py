"""Costs are what can be counted by hand, the same from the view and from a file of any flavor, and qonnx's."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from export import CostReport, cost_of_file, cost_of_student, cost_of_view, export_float, export_onnx, write_view
from export.cost.program import Operation, Program, Value, activation_peak, float_bytes, packed_bytes, stored_bytes
from export.parity.quant_session import runtime_readable_models
from quantizers import QuantSpec, calibrate, prepare
from quantizers.integer import Add, Concat

SHAPE = (2, 3, 15, 15)


def test_a_convolution_and_a_linear_layer_by_hand(net):
    net.quantize(net.conv(net.image(), "c", (3, 8), bits=2, stride=(2, 2)), "a", 4, 0.5)  # 8 x 8 x 8
    net.shape("a", "flat", "flatten", axis=1)
    report = cost_of_view(net.view(net.linear("flat", "fc", (512, 10), bits=3)), [SHAPE])
    conv, linear = report.layers
    assert (conv.kind, conv.output_shape, conv.macs) == ("conv", (8, 8, 8), 8 * 8 * 8 * 3 * 9)
    assert conv.parameters == 3 * 8 * 9 + 8 and conv.weight_bytes == 3 * 8 * 9 * 2 // 8
    assert conv.bops == conv.macs * 2 * 8
    assert (linear.macs, linear.parameters, linear.weight_bytes) == (5120, 5130, 5120 * 3 // 8)
    assert linear.bops == 5120 * 3 * 4 and (linear.weight_bits, linear.input_bits) == (3, 4)
    student, twin = report.student, report.float_twin
    assert student.macs == twin.macs == conv.macs + 5120 and twin.bops == student.macs * 1024
    assert student.weight_bytes == 54 + 1920 and twin.weight_bytes == 4 * (216 + 5120)
    assert student.parameter_bytes == 54 + 1920 + 4 * (8 + 8 + 10 + 10)  # a bias and a scale for each channel
    assert twin.parameter_bytes == 4 * (224 + 5130)
    # the float image and its codes; then codes alone: image and feature maps, which never exist in float
    assert student.peak_stored_bytes == 675 * 5 and student.peak_at == "image_quant"
    assert student.peak_packed_bytes == 675 + 512 // 2
    assert twin.peak_stored_bytes == 4 * (675 + 512) and twin.peak_at == "c"


def test_groups_and_one_scale(net):
    net.quantize(net.conv(net.image(), "c", (3, 4)), "a", 4, 0.5)
    net.conv("a", "d", (4, 8), groups=4, per_channel=False, bias=False)
    report = cost_of_view(net.view("d"), [SHAPE])
    depthwise = report.layers[1]
    assert depthwise.parameters == 8 * 9 and depthwise.macs == 8 * 9 * 225
    assert report.student.parameter_bytes == (108 + 72) // 2 + 4 * (4 + 4) + 4


def test_skip_connections_are_kept_and_quantized_at_once(net):
    net.quantize(net.conv(net.image(), "c", (3, 4), bits=8), "skip", 8, 0.5)  # 900 values
    net.quantize(net.conv("skip", "d", (4, 4)), "body", 8, 0.5)
    net.quantize(net.conv("body", "e", (4, 4)), "last", 8, 0.5)
    net.real(Add("sum", ("skip", "last"), "sum"))
    report = cost_of_view(net.view(net.quantize("sum", "s", 8, 0.5)), [SHAPE])
    assert report.student.peak_packed_bytes == 3 * 900  # skip, body, last; later skip, last, sum
    assert report.float_twin.peak_stored_bytes == 4 * 3 * 900


def chain(*roles: str, readers: dict[int, list[str]] | None = None) -> Program:
    operations, previous = [], "x"
    for number, role in enumerate(roles):
        name = f"v{number}"
        operations.append(Operation(name, role, (previous, *(readers or {}).get(number, [])), name))  # type: ignore[arg-type]
        previous = name
    bits = {"x": 32} | {f"v{n}": 4 if role == "quantize" else 32 for n, role in enumerate(roles)}
    return Program(tuple(operations), {name: Value(10, width) for name, width in bits.items()}, ("x",), (previous,))


@pytest.mark.parametrize(
    ("program", "stored", "packed", "twin"),
    [
        (chain("quantize"), 50, 5, 40),  # the image is float32 in a file, codes where everything takes its bits
        (chain("quantize", "compute"), 50, 45, 80),
        (chain("compute", "quantize"), 50, 45, 80),  # a kernel writes codes at once
        (chain("compute", "compute", "quantize"), 80, 80, 80),
        (chain("compute", "quantize", "compute", readers={2: ["v0"]}), 90, 85, 80),  # v0 is read again: it exists
        (chain("alias", "alias", "compute"), 80, 80, 80),
        (chain("compute", "compute", "compute", readers={2: ["x"]}), 120, 120, 120),
    ],
)
def test_liveness_by_hand(program, stored, packed, twin):
    assert activation_peak(program, stored_bytes).size_bytes == stored
    assert activation_peak(program, packed_bytes, packs_inputs=True).size_bytes == packed
    assert activation_peak(program, float_bytes, is_float=True).size_bytes == twin


@pytest.mark.parametrize("pack", ["auto", "int8"])
@pytest.mark.parametrize("flavor", ["ort", "qcdq", "qonnx"])
def test_view_and_file_agree(residual, tmp_path, flavor, pack):
    exported = write_view(residual, [SHAPE], tmp_path / "n.onnx", flavor=flavor, pack=pack)
    counted, read = cost_of_view(residual, [SHAPE]), cost_of_file(tmp_path / "n.onnx")
    assert read.layers == counted.layers and len(read.layers) == 6
    assert read.student == counted.student and read.float_twin == counted.float_twin
    assert read.file_bytes == exported.size_bytes and read.name == "n.onnx"
    assert exported.theoretical_bytes == counted.student.parameter_bytes
    stored = {"qonnx": 4 * 2120}.get(flavor, 2120 if pack == "int8" or flavor == "qcdq" else 256 + 324 + 304)
    assert exported.packed_weight_bytes == stored


def test_concatenations_and_shifted_grids_cost_the_same_in_every_file(net, tmp_path):
    net.quantize(net.conv(net.image(), "c", (3, 4)), "a", 8, 0.5, -100)
    net.quantize(net.conv("a", "d", (4, 12)), "b", 8, 0.5, -100)
    net.keep(Concat("joined", ("a", "b"), "joined", 1))
    net.quantize("joined", "low", 3, 4.0, -3)
    view = net.view(net.conv("low", "e", (16, 2)))
    counted = cost_of_view(view, [SHAPE])
    assert counted.layers[2].input_bits == 3 and counted.student.peak_packed_bytes == 225 * 32
    for flavor in ("ort", "qcdq", "qonnx"):
        write_view(view, [SHAPE], tmp_path / "n.onnx", flavor=flavor)
        read = cost_of_file(tmp_path / "n.onnx")
        assert (read.student, read.layers) == (counted.student, counted.layers), flavor


def test_linear_layers_in_blocks_cost_what_they_did(net, tmp_path):
    net.quantize(net.conv(net.image(), "c", (3, 4)), "a", 4, 0.5, -8)
    net.shape("a", "flat", "flatten", axis=1)
    net.quantize(net.linear("flat", "hidden", (900, 50), bits=2), "h", 4, 1.0)
    view = net.view(net.linear("h", "head", (50, 7), bits=3, bias=False))
    exported = write_view(view, [SHAPE], tmp_path / "n.onnx", linear="matmul_nbits")
    assert exported.operators_in_file["MatMulNBits"] == 2
    counted, read = cost_of_view(view, [SHAPE]), cost_of_file(tmp_path / "n.onnx")
    assert read.layers == counted.layers and [layer.macs for layer in read.layers[1:]] == [45000, 350]
    assert read.student.parameter_bytes == counted.student.parameter_bytes
    assert read.student.bops == counted.student.bops and read.float_twin.macs == counted.float_twin.macs
    # the codes of a layer in blocks are float32 while it runs
    assert read.student.peak_stored_bytes >= counted.student.peak_stored_bytes


def test_json_has_ratios(residual):
    value = json.loads(json.dumps(cost_of_view(residual, [SHAPE]).to_json()))
    assert value["ratios"]["macs"] == 1 and value["ratios"]["bops"] == pytest.approx(115343360 / 3938304)
    assert value["layers"][0]["name"] == "conv1" and value["file_bytes"] is None
    assert set(value["ratios"]) == set(value["student"]) - {"peak_at"}


class Branches(nn.Module):
    """Depthwise, strided, concatenated, pooled, with a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self.block(3, 8, 3)
        self.left, self.right = self.block(8, 4, 1), self.block(8, 4, 3)
        self.depthwise, self.pool = self.block(8, 8, 3, groups=8, stride=2), nn.MaxPool2d(3, 2, 1)
        self.head = nn.Linear(8, 5)

    @staticmethod
    def block(inputs, outputs, kernel, **options):
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x):
        x = self.pool(self.stem(x))
        x = torch.relu(x + torch.cat([self.left(x), self.right(x)], 1))
        return self.head(nn.functional.adaptive_avg_pool2d(self.depthwise(x), 1).flatten(1))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(4, 3, 17, 17, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def student(images):
    torch.manual_seed(0)
    student = prepare(Branches(), QuantSpec(weight_bits=2, act_bits=4), example_inputs=images)
    calibrate(student, [images])
    return student.eval()


@pytest.mark.parametrize("flavor", ["ort", "qcdq", "qonnx"])
def test_student_and_file_agree(student, images, tmp_path, flavor):
    export_onnx(student, images, tmp_path / "n.onnx", flavor=flavor)
    counted, read = cost_of_student(student), cost_of_file(tmp_path / "n.onnx")
    assert counted.layers == read.layers and counted.float_twin.macs == read.float_twin.macs
    for key in ("parameters", "macs", "bops", "weight_bytes", "parameter_bytes"):
        assert getattr(counted.student, key) == getattr(read.student, key), key
    if flavor != "qonnx":  # its graph computes nothing twice, so that activations live a little shorter
        assert counted.student == read.student


def test_the_float_twin_s_own_file_costs_what_is_said_of_it(student, images, tmp_path):
    torch.manual_seed(0)
    exported = export_float(Branches(), images, tmp_path / "float.onnx")
    read, counted = cost_of_file(tmp_path / "float.onnx"), cost_of_student(student)
    assert read.student.macs == counted.float_twin.macs and read.student.bops == counted.float_twin.bops
    assert [layer.macs for layer in read.layers] == [layer.macs for layer in counted.layers]
    assert read.student.weight_bytes == counted.float_twin.weight_bytes == exported.packed_weight_bytes
    assert {(layer.weight_bits, layer.input_bits) for layer in read.layers} == {(32, 32)}


def test_qonnx_counts_the_same(student, images, tmp_path):
    """Multiply-accumulates, BOPs and weight bits agree exactly, layer by layer.

    Differences by definition, stated here: qonnx's ``mem_o`` is the 32-bit output of every layer, summed, not a peak;
    it counts no biases; by default it leaves out weights that are zero (``discount_sparsity``), which is switched off.
    Padding is multiplied in both. A shifted grid (here the image's) is declared one bit wider in QONNX, and so counted.
    """
    pytest.importorskip("qonnx", reason="qonnx is in the extra [qonnx], for Python 3.11 and newer")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.inference_cost import inference_cost

    export_onnx(student, images, tmp_path / "n.onnx", flavor="qonnx")
    ours = cost_of_file(tmp_path / "n.onnx")
    with runtime_readable_models():
        model = ModelWrapper(str(tmp_path / "n.onnx"))
        theirs = inference_cost(model, discount_sparsity=False, cost_breakdown=True)
    total = theirs["total_cost"]
    first = ours.layers[0]
    shifted = first.macs * first.weight_bits
    assert total["total_macs"] == ours.student.macs and total["total_bops"] == ours.student.bops + shifted
    assert total["total_mem_w_bits"] == 8 * ours.student.weight_bytes
    weights = total["total_mem_w_elems"]
    biases = sum(layer.output_shape[0] for layer in ours.layers)
    assert weights == ours.student.parameters - biases
    outputs = sum(torch.Size(layer.output_shape).numel() for layer in ours.layers)
    assert total["total_mem_o_elems"] == outputs and total["total_mem_o_bits"] == 32 * outputs
    rows = [(row["total_macs"], row["total_bops"], row["total_mem_w_bits"]) for row in theirs["node_cost"].values()]
    assert rows[0] == (first.macs, first.bops + shifted, 8 * first.weight_bytes)
    assert rows[1:] == [(layer.macs, layer.bops, 8 * layer.weight_bytes) for layer in ours.layers[1:]]
    assert len(rows) == 5


def save(tmp_path, nodes, *, shape=("batch", 3, 4), initializers=(), domain=None):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], list(initializers))
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "n.onnx")
    return tmp_path / "n.onnx"


def test_matrix_products(tmp_path):
    weight = helper.make_tensor("w", TensorProto.FLOAT, (4, 4), [1.0] * 16)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="by_weights"),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["b", "a"], ["c"], name="of_activations"),
        helper.make_node("MatMul", ["a", "c"], ["y"], name="again"),
    ]
    report = cost_of_file(save(tmp_path, nodes, initializers=[weight]))
    assert [(layer.name, layer.macs, layer.parameters) for layer in report.layers] == [("by_weights", 3 * 4 * 4, 16)]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "without a graph"), (b"\xff\xff\xff\xff", "not an ONNX file, or it is damaged"), (b"hello", "ONNX file")],
)
def test_files_that_are_none(tmp_path, content, message):
    (tmp_path / "n.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        cost_of_file(tmp_path / "n.onnx")
    with pytest.raises(FileNotFoundError, match="no model file at"):
        cost_of_file(tmp_path / "other.onnx")


def test_graphs_whose_cost_cannot_be_told(tmp_path, student):
    other = [helper.make_node("Fancy", ["x"], ["y"], domain="com.example")]
    with pytest.raises(ValueError, match=r"n\.onnx: its operators from com\.example are unknown"):
        cost_of_file(save(tmp_path, other, domain="com.example"))
    with pytest.raises(ValueError, match=r"n\.onnx: the size of the tensor 'x' is unknown; export with fixed"):
        cost_of_file(save(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], shape=("batch", 3, "height")))
    with pytest.raises(TypeError, match="cost_of_student takes what quantizers.prepare made, got Branches"):
        cost_of_student(Branches())
    assert isinstance(cost_of_student(student), CostReport)


def saved(path, nodes, constants, shape, out):
    """Write a float file of one input ``x`` and one output ``y``."""
    kind = TensorProto.FLOAT if all(one.dtype == np.float32 for one in constants.values()) else TensorProto.FLOAT16
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", kind, shape)], [helper.make_tensor_value_info("y", kind, out)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def values(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("nodes", "constants", "shapes", "macs", "parameters"),
    [
        ([("ConvTranspose", "x w", "y")], {"w": values(8, 4, 3, 3)}, ([1, 8, 5, 5], [1, 4, 7, 7]), 25 * 288, 288),
        ([("MatMul", "w x", "y")], {"w": values(8, 5)}, ([1, 5, 4], [1, 8, 4]), 160, 40),
        (
            [("MatMul", "x w", "m"), ("Add", "m b", "y")], {"w": values(8, 5), "b": values(5)},
            ([1, 7, 8], [1, 7, 5]), 280, 45,
        ),
        ([("MatMul", "x w", "m"), ("MatMul", "m w", "y")], {"w": values(8, 8)}, ([1, 8], [1, 8]), 128, 64),
        # other matrices made of one constant: parts of it, and products with it
        ([("Mul", "s w", "a"), ("Mul", "s v", "b"), ("MatMul", "x a", "m"), ("MatMul", "m b", "y")],
         {"w": values(8, 8), "v": values(8, 8), "s": values(1)}, ([1, 8], [1, 8]), 128, 128),
        ([("MatMul", "x w", "m"), ("Add", "m m", "y")], {"w": values(8, 5)}, ([1, 8], [1, 5]), 40, 40),
    ],
)  # fmt: skip
def test_layers_of_other_programs_by_hand(nodes, constants, shapes, macs, parameters, tmp_path):
    made = [helper.make_node(op, inputs.split(), [output]) for op, inputs, output in nodes]
    report = cost_of_file(saved(tmp_path / "net.onnx", made, constants, *shapes))
    assert (report.student.macs, report.student.parameters) == (macs, parameters)


def test_half_precision_has_inputs_of_sixteen_bits(tmp_path):
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    path = saved(tmp_path / "n.onnx", [node], {"w": values(4, 8, 3, 3, dtype=np.float16)}, [1, 8, 5, 5], [1, 4, 3, 3])
    (layer,) = cost_of_file(path).layers
    assert (layer.weight_bits, layer.input_bits, layer.bops) == (16, 16, layer.macs * 256)


def test_what_is_cast_to_single_precision_has_its_width(tmp_path):
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [onnx.numpy_helper.from_array(values(8, 5), "w")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "n.onnx")
    assert cost_of_file(tmp_path / "n.onnx").layers[0].input_bits == 32


def test_what_is_not_counted_is_refused_by_name(tmp_path):
    node = helper.make_node("LSTM", ["x", "w", "r"], ["", "y", ""], hidden_size=4)
    constants = {"w": values(1, 16, 8), "r": values(1, 16, 4)}
    with pytest.raises(ValueError, match=r"the cost of LSTM is not counted, only that of .*ConvTranspose"):
        cost_of_file(saved(tmp_path / "n.onnx", [node], constants, [3, 1, 8], [1, 1, 4]))
