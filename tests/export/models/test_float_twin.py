"""The float twin computes what the float model computes."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export import ExportError, export_float
from export.runtime import open_session


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
