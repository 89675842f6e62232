"""A file is judged in the runtime that it was written for: logits on every image, codes where a graph ends there."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import check_parity, export_onnx
from export.runtime import open_session
from export.targets import sessions
from quantizers import QuantSpec, Student, calibrate, prepare

pytestmark = pytest.mark.usefixtures("eager")


class Fake:
    """A runtime that computes with ONNX Runtime, and then changes what it gives."""

    version = "fake 1.0"
    wrong: str = ""

    def __init__(self, content: bytes, threads: int) -> None:
        if self.wrong == "load":
            raise RuntimeError("no such operator")
        self.session = open_session(content, optimize=False, threads=threads)

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[np.ndarray]:
        found = [np.array(values) for values in self.session.run(list(names), dict(feeds))]
        is_logits = names[0] == "logits"
        if (self.wrong == "logits" and is_logits) or (self.wrong == "codes" and not is_logits):
            found[0].reshape(-1)[0] += 1
        if self.wrong == "second" and is_logits:
            found[1].reshape(-1)[-1] += 1
        if self.wrong == "none":
            found[0] = np.full_like(found[0], np.nan, dtype=np.float32)
        if self.wrong == "run" and is_logits:
            raise RuntimeError("out of registers")
        if self.wrong == "shape":
            found[0] = found[0][:, :1]
        return found


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setattr(Fake, "wrong", "")
    monkeypatch.setitem(sessions.SESSIONS, "openvino", Fake)
    return Fake


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def student(eager: None, images: Tensor) -> Student:
    torch.manual_seed(0)
    made = prepare(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)), QuantSpec(), images[:2])
    calibrate(made, images)
    return made.eval()


@pytest.fixture
def path(student: Student, images: Tensor, tmp_path: Path) -> Path:
    return export_onnx(student, images[:2], tmp_path / "student.onnx", target="openvino").path


def test_a_right_runtime_passes(fake: type[Fake], student: Student, images: Tensor, path: Path) -> None:
    report = check_parity(student, path, [images], runtime="openvino")
    assert report.passed and report.runtime is not None
    assert (report.runtime.runtime, report.runtime.images, report.runtime.layer_images) == ("fake 1.0", 12, 4)
    assert [layer.name for layer in report.runtime.layers] == [layer.name for layer in report.layers]
    assert report.runtime.sentence.endswith("equal to the student")
    assert json.loads(json.dumps(report.to_json()))["runtime"]["faults"] == []
    assert check_parity(student, path, [images]).runtime is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("logits", "fake 1.0: logits of 1 of 12 images differ by up to 1"),
        ("codes", "fake 1.0: 2 of 2 quantizers differ; the first is input_1_quant"),
        ("shape", "fake 1.0: logits are [12, 3] in the student, [12, 1]"),
        ("none", "fake 1.0: logits of 12 of 12 images differ by up to inf"),
        ("none", "fake 1.0: 2 of 2 quantizers differ"),
        ("run", "fake 1.0: it failed: out of registers"),
        ("load", "openvino: it does not load the file: no such operator"),
    ],
)
def test_a_wrong_runtime_is_a_fault(
    fake: type[Fake],
    monkeypatch: pytest.MonkeyPatch,
    student: Student,
    images: Tensor,
    path: Path,
    wrong: str,
    words: str,
) -> None:
    monkeypatch.setattr(Fake, "wrong", wrong)
    report = check_parity(student, path, [images], runtime="openvino")
    assert not report.passed and words in " ".join(report.faults) and report.off.beyond == 0


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Conv2d(1, 2, 3), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(self.body(x)).flatten(1)
        return self.first(features), self.second(features)


@pytest.mark.parametrize(("wrong", "beyond"), [("", 0), ("second", 1)])
def test_every_output_is_compared(
    fake: type[Fake], monkeypatch: pytest.MonkeyPatch, images: Tensor, tmp_path: Path, wrong: str, beyond: int
) -> None:
    torch.manual_seed(0)
    made = prepare(TwoHeads(), QuantSpec(), images[:2])
    calibrate(made, images)
    file = export_onnx(made.eval(), images[:2], tmp_path / "two.onnx", target="openvino").path
    monkeypatch.setattr(Fake, "wrong", wrong)
    report = check_parity(made, file, [images], runtime="openvino")
    assert report.runtime is not None and report.runtime.beyond == beyond and report.passed is (not beyond)


def test_what_cannot_be_asked_is_named(student: Student, images: Tensor, path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="runtime must be one of iree, opencv, openvino, tvm, got 'mnn'"):
        check_parity(student, path, [images], runtime="mnn")
    if sessions.unusable("openvino"):
        with pytest.raises(ImportError, match="openvino, which is missing: pip install 'openvino'"):
            check_parity(student, path, [images], runtime="openvino")


@pytest.mark.parametrize(
    ("wrong", "words"), [("ImportError('libGL.so.1')", "libGL.so.1"), ("OSError('no tbb')", "no tbb")]
)
def test_a_damaged_runtime_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    student: Student,
    images: Tensor,
    path: Path,
    wrong: str,
    words: str,
) -> None:
    (tmp_path / "openvino.py").write_text(f"raise {wrong}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    said = rf"openvino is installed, but cannot be imported \({words}\); reinstall it: pip install 'openvino'"
    with pytest.raises(ImportError, match=said):
        check_parity(student, path, [images], runtime="openvino")
    assert re.search(said, sessions.unusable("openvino"))


def test_what_a_runtime_raises_while_it_loads_is_a_fault(
    fake: type[Fake], monkeypatch: pytest.MonkeyPatch, student: Student, images: Tensor, path: Path
) -> None:
    def refuse(self: Fake, content: bytes, threads: int) -> None:
        raise ValueError("bad model: op X")

    monkeypatch.setattr(Fake, "__init__", refuse)
    report = check_parity(student, path, [images], runtime="openvino")
    assert not report.passed and "openvino: it does not load the file: bad model: op X" in report.faults


def test_an_opencv_of_before_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", types.SimpleNamespace(__version__="4.14.0"))
    with pytest.raises(ImportError, match=r"opencv 4\.14\.0 is installed, but such files need OpenCV 5"):
        sessions.open_in("opencv", b"")


def test_a_runtime_is_installed_if_all_of_its_packages_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "iree" / "compiler").mkdir(parents=True)
    (tmp_path / "iree" / "compiler" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "iree"]:
        monkeypatch.delitem(sys.modules, name)
    assert "iree.runtime, which is missing" in sessions.unusable("iree"), "the compiler alone runs nothing"
    if sessions.unusable("tvm"):
        (tmp_path / "tvm").mkdir()
        assert "tvm, which is missing" in sessions.unusable("tvm"), "a folder of that name is no package"
