"""Files that do what the student does on the images at hand, and are not the student: each is named by its constant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from export import ParityError, check_parity, export_onnx, repack
from export.parity.expected import view_of
from export.parity.graphs import compare_graphs
from quantizers import QuantSpec, calibrate, prepare

Change = Callable[[onnx.ModelProto], object]
DEAD = 3  # a channel of the first layer that no image gets past its ReLU
FORMS = {
    "ort in bytes": {"pack": "int8"},
    "ort packed": {"pack": "packed"},
    "ort in blocks": {"pack": "packed", "linear": "matmul_nbits"},
    "ort, another operator set": {"pack": "int8", "opset": 19},
    "qcdq": {"flavor": "qcdq"},
    "qonnx": {"flavor": "qonnx"},
}


class Net(nn.Module):
    """Layers with a dead channel, a sum, a product with a function, a shuffle, both poolings and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.mean = nn.AvgPool2d(2)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.shuffle = nn.ChannelShuffle(2)
        self.middle = nn.Linear(8 * 9, 8)
        self.head = nn.Linear(8, 6)
        with torch.no_grad():
            self.stem.bias[DEAD] = -100

    def forward(self, x):
        x = self.mean(torch.relu(self.stem(x)))
        x = torch.relu(x + self.body(x))
        x = self.shuffle(x * torch.sigmoid(self.gate(x)))
        x = nn.functional.max_pool2d(x, 3, 2, padding=1)
        return self.head(torch.relu(self.middle(x.flatten(1))))


def images(seed: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    student = prepare(Net(), QuantSpec(weight_bits=4, act_bits=4), example_inputs=images(1))
    calibrate(student, [images(1)])
    return student.eval()


@pytest.fixture(scope="module")
def files(student, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {
        name: export_onnx(student, images(1), folder / f"{number}.onnx", **settings).path
        for number, (name, settings) in enumerate(FORMS.items())
    }


def tensor_of(model: onnx.ModelProto, start: str) -> TensorProto:
    return next(entry for entry in model.graph.initializer if entry.name.startswith(start))


def altered(start: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def apply(model: onnx.ModelProto) -> None:
        tensor = tensor_of(model, start)
        values = np.asarray(numpy_helper.to_array(tensor))
        changed = np.asarray(change(values.copy()), values.dtype).reshape(values.shape)
        tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))

    return apply


def in_channel(factor: float = 1.0, more: float = 0) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[DEAD] = values[DEAD] * factor + more
        return values

    return change


def attribute(operator: str, name: str, value: object) -> Change:
    def apply(model: onnx.ModelProto) -> None:
        node = next(entry for entry in model.graph.node if entry.op_type == operator)
        kept = [entry for entry in node.attribute if entry.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return apply


def unreached_clip(model: onnx.ModelProto) -> None:
    maker = next(node for node in model.graph.node if "logits" in node.output)
    maker.output[0] = "earlier"
    for name, value in (("lowest", -1e6), ("highest", 1e6)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    model.graph.node.append(helper.make_node("Clip", ["earlier", "lowest", "highest"], ["logits"], name="clip"))


def an_input_for_a_constant(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("head.weight.scale", TensorProto.FLOAT, [6]))


def other_operators(model: onnx.ModelProto) -> None:
    model.opset_import[0].version += 1


def other_ir(model: onnx.ModelProto) -> None:
    model.ir_version += 1


def other_metadata(key: str, value: str) -> Change:
    def apply(model: onnx.ModelProto) -> None:
        next(entry for entry in model.metadata_props if entry.key == key).value = value

    return apply


UNSEEN: dict[str, tuple[str, Change, str]] = {
    "scale of a dead channel's weights, 0.1 %": (
        "ort in bytes", altered("stem.weight.scale", in_channel(1.001)), r"'stem.weight.scale' is \S+ in the file, \S+ "
        r"in the student at \[3\] \(1 of 8"),
    "a dead channel's bias code": (
        "ort in bytes", altered("stem.bias.int32", in_channel(more=1)), r"'stem.bias.int32' is -\d+ in the file"),
    "a dead channel's bias, plain": ("qcdq", altered("stem.bias", in_channel(1.001)), r"'stem.bias' is -100\.\d+ in"),
    "a dead channel's weight": (
        "ort packed", altered("stem.weight.int8", in_channel(more=1)), r"'stem.weight.int8' is -?\d+ in the file, "
        r"-?\d+ in the student at \[3, 0, 0, 0\] \(27 of 216"),
    "a dead channel's zero point": (
        "ort in bytes", altered("stem.weight.zero_point", in_channel(more=1)), "'stem.weight.zero_point' is 1 in the "),
    "scale of a grid, a millionth": (
        "ort in bytes", altered("mul_quant.scale", lambda scale: scale * (1 + 1e-6)), "'mul_quant.scale' is "),
    "a bound that no value reaches": (
        "qcdq", altered("mean_quant_to4.high", lambda high: high + 1), "is 16 in the file, 15"),
    "an attribute without effect here": ("qcdq", attribute("AveragePool", "ceil_mode", 1), "ceil_mode of AveragePool "
                                         r"'mean' .* is 1 in the file, 0 in the student"),
    "an attribute that export never gives": (
        "qcdq", attribute("Conv", "auto_pad", "NOTSET"), "auto_pad .* not given in"),
    "a bound behind the logits that none reaches": ("ort in bytes", unreached_clip, "the node Clip that makes 'logits'|"
                                                    "'logits' is Clip of earlier, lowest, highest in the file"),
    "a constant that a caller may replace": (
        "ort in bytes", an_input_for_a_constant, "its inputs are .*head.weight.sc"),
    "another operator set": ("ort in bytes", other_operators, "its operator sets are .*18.*, but export writes|opset"),
    "another IR version": ("ort in bytes", other_ir, "its IR version is 9, but export writes 8"),
    "other widths in its metadata": (
        "ort in bytes", other_metadata("weight_bits", '{"stem": 2}'), "metadata `weight_b"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSEEN)
def test_what_images_do_not_reach_is_named(student, files, tmp_path, name):
    form, change, words = UNSEEN[name]
    model = onnx.load(files[form])
    change(model)
    onnx.save(model, tmp_path / "n.onnx")
    faint = [images(2, 0.3)]
    assert check_parity(student, tmp_path / "n.onnx", faint, constants=False).passed  # behavior says nothing
    report = check_parity(student, tmp_path / "n.onnx", faint)
    with pytest.raises(ParityError, match=words):
        report.raise_if_worse()
    assert report.differences and report.to_json()["differences"] == report.differences


@pytest.mark.parametrize("form", FORMS)
def test_the_file_itself_has_no_difference(student, files, form):
    found = compare_graphs(onnx.load(files[form]), view_of(student), (3, 12, 12))
    assert found.differences == () and found.note == "" and found.compared > 50


@pytest.mark.parametrize("form", FORMS)
def test_each_bit_of_each_constant_counts(student, files, form):
    """One bit of the last byte of every constant, packed and in blocks too; each is the one that is named."""
    content = files[form].read_bytes()
    count = len(onnx.load_from_string(content).graph.initializer)
    view = view_of(student)
    for index in range(count):
        model = onnx.load_from_string(content)
        tensor = model.graph.initializer[index]
        assert tensor.raw_data, "every constant is stored as bytes"
        tensor.raw_data = tensor.raw_data[:-1] + bytes([tensor.raw_data[-1] ^ 1])
        found = compare_graphs(model, view, (3, 12, 12))
        assert len(found.differences) == 1 and repr(tensor.name) in found.differences[0], tensor.name


def test_each_attribute_counts(student, files):
    content = files["ort in blocks"].read_bytes()
    for place, node in enumerate(onnx.load_from_string(content).graph.node):
        for number, entry in enumerate(node.attribute):
            model = onnx.load_from_string(content)
            changed = model.graph.node[place].attribute[number]
            if entry.ints:
                changed.ints[0] += 1
            else:
                changed.i += 1
            found = compare_graphs(model, view_of(student), (3, 12, 12))
            assert any(f"the attribute {entry.name} of {node.op_type}" in words for words in found.differences)


def test_example_inputs_of_another_type_are_refused(student, tmp_path):
    with pytest.raises(ValueError, match="got ndarray"):
        export_onnx(student, images(1).numpy(), tmp_path / "n.onnx")


@pytest.mark.parametrize("storage", ["int8", ["int4"], ["int2", "int4"]])
def test_repacked_files_are_compared_too(student, files, tmp_path, storage):
    (tmp_path / "n.onnx").write_bytes(repack(files["ort in blocks"], storage))
    report = check_parity(student, tmp_path / "n.onnx", [images(2)])
    assert report.passed and report.constants > 50


@pytest.mark.parametrize("form", ["ort in bytes", "ort in blocks"])
def test_the_order_of_constants_and_the_names_of_nodes_are_no_difference(student, files, form):
    model = onnx.load(files[form])
    for node in model.graph.node:
        node.name, node.doc_string = f"renamed {node.name}", "a comment"
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    model.graph.initializer.extend(reversed(tensors))
    found = compare_graphs(model, view_of(student), (3, 12, 12))
    assert found.differences == () and found.compared > 50


@pytest.mark.parametrize(
    ("producer", "words"), [("other", "the program 'other' wrote"), ("", "does not give its name")]
)
def test_another_programs_graph_is_judged_by_behavior_and_says_so(student, files, tmp_path, producer, words):
    model = onnx.load(files["ort in bytes"])
    unreached_clip(model)
    model.producer_name = producer
    onnx.save(model, tmp_path / "n.onnx")
    report = check_parity(student, tmp_path / "n.onnx", [images(2)])
    assert report.passed and report.constants == 0 and report.differences == ()
    assert any("constants were not compared" in note and words in note for note in report.notes)


def test_another_programs_file_with_the_same_graph_is_compared(student, files, tmp_path):
    model = onnx.load(files["ort in bytes"])
    altered("stem.weight.scale", in_channel(1.001))(model)
    model.producer_name = "other"
    onnx.save(model, tmp_path / "n.onnx")
    with pytest.raises(ParityError, match=r"'stem\.weight\.scale'"):
        check_parity(student, tmp_path / "n.onnx", [images(2)]).raise_if_worse()


def test_a_file_of_an_older_version_may_have_another_graph(student, files, tmp_path):
    model = onnx.load(files["ort in bytes"])
    unreached_clip(model)
    other_metadata("toolkit", "qkd-toolkit 0.0.1")(model)
    onnx.save(model, tmp_path / "n.onnx")
    report = check_parity(student, tmp_path / "n.onnx", [images(2)])
    assert report.passed and any("qkd-toolkit 0.0.1, and not" in note for note in report.notes)
