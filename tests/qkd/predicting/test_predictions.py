"""What the report tells of a file's answers is what the file says, whatever its output stands for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from export import Preprocessing, export_float
from qkd.data import normalize
from qkd.data.splits import MemorySplit
from qkd.predicting.predictions import predictions_of

MEAN, STD = (0.4,), (0.2,)


@pytest.mark.parametrize("last", [nn.Identity(), nn.Softmax(1), nn.LogSoftmax(1)])
def test_the_confidence_is_the_probability(tmp_path: Path, last: nn.Module) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    pixels = torch.randint(0, 256, (12, 1, 4, 4), dtype=torch.uint8)
    preprocessing = Preprocessing(mean=MEAN, std=STD, image_size=(4, 4), classes=("a", "b", "c"))
    given = normalize(pixels, MEAN, STD)
    path = tmp_path / "teacher.onnx"
    export_float(nn.Sequential(body, last).eval(), given[:2], path, preprocessing=preprocessing)
    data = SimpleNamespace(eval_batch_size=5, workers=0)
    run: Any = SimpleNamespace(config=SimpleNamespace(data=data, threads=1))
    splits: Any = SimpleNamespace(test=MemorySplit(pixels, torch.ones(12, dtype=torch.int64)), mean=MEAN, std=STD)
    found = predictions_of(path, run, splits)
    expected = body(given).softmax(1).detach().numpy()
    np.testing.assert_allclose(found.confidence, expected.max(1), rtol=1e-5)
    assert found.classes.tolist() == expected.argmax(1).tolist() and found.labels.tolist() == [1] * 12
