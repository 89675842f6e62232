"""onnxruntime's static int8 of a float file: on integer kernels, close to it, and nothing left behind."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export import ExportError, export_float, export_int8_baseline
from export.models.census import count_operators, optimized_graph
from export.runtime import open_session

IMAGES = np.random.default_rng(0).standard_normal((30, 3, 12, 12), dtype=np.float32)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x):
        return self.body(x)


@pytest.fixture(scope="module")
def float_file(tmp_path_factory):
    torch.manual_seed(0)
    return export_float(Net().eval(), torch.zeros(2, 3, 12, 12), tmp_path_factory.mktemp("f") / "float.onnx").path


def test_images_may_be_a_tensor(float_file, tmp_path):
    array = export_int8_baseline(float_file, IMAGES[:4], tmp_path / "array.onnx").read_bytes()
    assert export_int8_baseline(float_file, torch.from_numpy(IMAGES[:4]), tmp_path / "t.onnx").read_bytes() == array


def test_it_runs_on_integers_and_stays_close(float_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger().level
    path = export_int8_baseline(float_file, IMAGES, tmp_path / "int8.onnx")
    assert [entry.name for entry in tmp_path.iterdir()] == ["int8.onnx"] and logging.getLogger().level == level
    operators = count_operators(optimized_graph(path.read_bytes(), [(2, 3, 12, 12)]))
    assert operators["QLinearConv"] == 2 and "Conv" not in operators and "BatchNormalization" not in operators
    weights = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    assert any(tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4 for tensor in weights.values())
    assert any(name.endswith("_scale") and list(tensor.dims) == [8] for name, tensor in weights.items()), "per channel"
    want, found = (open_session(file, optimize=True).run(None, {"images": IMAGES})[0] for file in (float_file, path))
    assert 0 < np.abs(want - found).max() < 0.1 * np.abs(want).max()


@pytest.mark.parametrize(
    ("images", "message"),
    [(IMAGES[:0], "calibration images are"), (IMAGES[:, :, 1:], r"calibration images are \[30, 3, 11, 12\]")],
)
def test_images_that_do_not_fit(float_file, tmp_path, images, message):
    with pytest.raises(ExportError, match=message):
        export_int8_baseline(float_file, images, tmp_path / "int8.onnx")
    assert list(tmp_path.iterdir()) == []


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model file"):
        export_int8_baseline(tmp_path / "none.onnx", IMAGES, tmp_path / "int8.onnx")
