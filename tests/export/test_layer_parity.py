"""Kernels are compared one by one, on the codes they should get, and a kernel that differs is found out."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from export import check_parity, export_onnx
from export.parity.layers import LayerTally, SingleLayers
from export.runtime import open_session
from quantizers import QuantSpec, calibrate, prepare


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(x + self.second(x))
        return self.head(self.pool(x).flatten(1))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def student(images):
    torch.manual_seed(0)
    student = prepare(Net(), QuantSpec(weight_bits=4, act_bits=4), example_inputs=images)
    calibrate(student, [images])
    return student.eval()


@pytest.fixture(scope="module")
def path(student, images, tmp_path_factory):
    path = tmp_path_factory.mktemp("layers") / "student.onnx"
    export_onnx(student, images, path, strict=True)
    return path


def pieces_of(path, images) -> tuple[SingleLayers, dict[str, np.ndarray], list[str]]:
    """Return the graph in pieces, and every stored tensor with optimizations off."""
    import json

    model = onnx.load(path)
    taps = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "quantizers"))
    tensors = list(dict.fromkeys(tap["tensor"] for tap in taps))
    exposed = onnx.load(path)
    exposed.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None) for name in tensors)
    session = open_session(exposed.SerializeToString(), optimize=False)
    found = session.run(["logits", *tensors], {"images": images.numpy()})
    values = {"images": images.numpy(), **dict(zip(["logits", *tensors], found, strict=True))}
    return SingleLayers(model, tensors, ["images"], "logits", 1), values, tensors


def test_kernels_alone_give_the_codes_of_the_file(path, images):
    pieces, values, tensors = pieces_of(path, images)
    alone = pieces.run(values)
    assert set(alone) == {*tensors, "logits"}
    for name in tensors:
        assert np.array_equal(alone[name], values[name]), name
        assert alone[name].any()
    assert np.allclose(alone["logits"], values["logits"], atol=1e-5)


def test_a_piece_sees_what_it_is_fed_and_not_what_an_earlier_layer_gives(path, images):
    pieces, values, tensors = pieces_of(path, images)
    _, target = tensors[0], tensors[1]
    nodes, feeds = pieces._piece(target)
    assert feeds == [tensors[0]] and [node.op_type for node in nodes].count("Conv") == 1
    changed = {**values, tensors[0]: np.roll(values[tensors[0]], 1, axis=0)}
    assert np.array_equal(pieces.run(changed)[target], np.roll(values[target], 1, axis=0))


def test_a_piece_runs_the_integer_kernel(path, images, tmp_path):
    pieces, values, tensors = pieces_of(path, images)
    nodes, feeds = pieces._piece(tensors[1])
    pieces.run(values)
    used = {name for node in nodes for name in node.input}
    shapes = [helper.make_tensor_value_info(n, onnx.TensorProto.UINT8, ["b", *values[n].shape[1:]]) for n in feeds]
    out = [helper.make_tensor_value_info(tensors[1], onnx.TensorProto.UINT8, None)]
    constants = [entry for entry in pieces.model.graph.initializer if entry.name in used]
    graph = helper.make_graph(nodes, "piece", shapes, out, constants)
    model = onnx.ModelProto(ir_version=pieces.model.ir_version, opset_import=pieces.model.opset_import, graph=graph)
    open_session(model.SerializeToString(), optimize=True, optimized_path=tmp_path / "optimized.onnx")
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "QLinearConv" in operators and "Conv" not in operators


def test_a_kernel_that_differs_is_counted_where_it_differs_and_nowhere_else(path, images):
    pieces, values, tensors = pieces_of(path, images)
    wrong = {**values, tensors[2]: np.where(values[tensors[2]] > 0, values[tensors[2]] - 1, 0).astype(np.uint8)}
    tally = LayerTally([{"name": name} for name in tensors])
    off = [wrong[name].astype(np.int64) for name in tensors]
    alone = pieces.run({**values, **{tensors[2]: wrong[tensors[2]]}})
    tally.add(off, off, [alone[name].astype(np.int64) for name in tensors], len(images))
    rows = {row.name: row for row in tally.rows()}
    assert rows[tensors[1]].differing_on == 0
    assert rows[tensors[2]].differing_on == int((values[tensors[2]] > 0).sum()) > 0
    assert rows[tensors[2]].max_steps_on == 1 and rows[tensors[2]].differing == 0


def test_the_report_tells_kernels_and_student_apart(student, path, images, tmp_path):
    right = check_parity(student, path, [images])
    assert right.layers and not any(row.differing or row.differing_on for row in right.layers)
    assert right.output_steps_on is not None and right.output_steps_on < 0.5

    model = onnx.load(path)  # a file of another net: the student differs, its kernels do not
    weight = next(entry for entry in model.graph.initializer if entry.name == "head.bias.int32")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + 2**20, weight.name))
    second = next(entry for entry in model.graph.initializer if entry.name.startswith("second.bias.int32"))
    second.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(second) + 500, second.name))
    onnx.save(model, tmp_path / "other.onnx")
    other = check_parity(student, tmp_path / "other.onnx", [images])
    assert any(row.differing for row in other.layers)
    assert not any(row.differing_on for row in other.layers)
    assert other.off.max_steps > 2**19 and other.output_steps_on < 0.5


def test_without_layers_there_is_no_figure(student, path, images):
    assert check_parity(student, path, [images], layer_images=0).output_steps_on is None
