"""The float twin computes what the float model computes."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export import ExportError, export_float, export_int8_baseline
from export.runtime import open_session
from export.storage.metadata import strip_notes


def make_model() -> nn.Module:
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def test_any_batch_gives_torch_s_logits(tmp_path, capfd):
    model, images = make_model(), torch.randn(7, 3, 9, 9)
    model(images)  # moves the running statistics
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exported = export_float(model, images[:1], tmp_path / "twin.onnx", opset=18)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert capfd.readouterr().out == ""
    assert (exported.flavor, exported.opset, exported.packed, exported.layers) == ("float", 18, False, ())
    assert exported.size_bytes == (tmp_path / "twin.onnx").stat().st_size
    assert "BatchNormalization" not in exported.operators  # folded when the file is loaded
    graph = onnx.load(tmp_path / "twin.onnx").graph
    assert [entry.name for entry in graph.input] == ["images"] and [entry.name for entry in graph.output] == ["logits"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    with torch.no_grad():
        wanted = model.eval()(images).numpy()
    session = open_session(tmp_path / "twin.onnx", optimize=True)
    for batch in (1, 7):
        found = session.run(["logits"], {"images": images[:batch].numpy()})[0]
        np.testing.assert_allclose(found, wanted[:batch], rtol=1e-4, atol=1e-5)


def test_a_model_that_the_exporter_refuses(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="refuses Branching"):
        export_float(Branching(), torch.randn(1, 3, 4, 4), tmp_path / "n.onnx")
    assert not os.listdir(tmp_path)


def test_missing_onnxscript_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install onnxscript"):
        export_float(make_model(), torch.randn(1, 3, 9, 9), tmp_path / "n.onnx")


def test_folder_must_exist(tmp_path):
    with pytest.raises(ExportError, match="create it first"):
        export_float(make_model(), torch.randn(1, 3, 9, 9), tmp_path / "none" / "n.onnx")


@pytest.mark.parametrize("int8", [False, True])
def test_files_hold_no_path_and_two_exports_are_the_same_bytes(tmp_path, monkeypatch, int8):
    """PyTorch's exporter notes the stack of every node: local paths and source lines, others at each call."""
    monkeypatch.chdir(tmp_path)
    model, images = make_model(), torch.randn(4, 3, 8, 8)
    names = ["one", "two"]
    for name, depth in zip(names, (0, 3), strict=True):
        call = functools.partial(export_float, model, images, f"{name}.onnx")
        for _ in range(depth):  # from another place of the stack
            call = functools.partial(lambda inner: inner(), call)
        call()
        if int8:
            export_int8_baseline(f"{name}.onnx", images.numpy(), tmp_path / f"{name}.onnx")
    one, two = ((tmp_path / f"{name}.onnx").read_bytes() for name in names)
    assert one == two
    for text in (str(tmp_path), __file__, str(Path.cwd()), ".py", "stack_trace", "pkg.torch"):
        assert text.encode() not in one, text


def test_notes_are_stripped_wherever_they_are():
    note = {"key": "pkg.torch.onnx.stack_trace", "value": "/home/me/net.py"}
    x = onnx.helper.make_tensor_value_info("x", 1, [1])
    inner = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"], doc_string="/home/me")], "inner",
                                   [], [onnx.helper.make_tensor_value_info("y", 1, [1])])  # fmt: skip
    node = onnx.helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    values = [x, onnx.helper.make_tensor_value_info("z", 1, [1])]
    weight = onnx.helper.make_tensor("c", onnx.TensorProto.BOOL, [], [True])
    graph = onnx.helper.make_graph([node], "outer", values[:1], values[1:], [weight], doc_string="/home/me")
    model = onnx.helper.make_model(graph, doc_string="/home/me")
    body = onnx.helper.make_node("Identity", ["a"], ["b"])
    opsets = [onnx.helper.make_opsetid("", 18)]
    model.functions.append(onnx.helper.make_function("own", "f", ["a"], ["b"], [body], opsets))
    branch = model.graph.node[0].attribute[0].g
    function = model.functions[0]
    parts = (model, model.graph, model.graph.node[0], branch, branch.node[0], branch.output[0], model.graph.input[0],
             model.graph.output[0], model.graph.initializer[0], function, function.node[0])  # fmt: skip
    for part in parts:
        part.metadata_props.add(**note)
    assert model.SerializeToString().count(b"/home/me") >= len(parts)
    strip_notes(model)
    assert b"/home/me" not in model.SerializeToString() and b"pkg.torch" not in model.SerializeToString()
