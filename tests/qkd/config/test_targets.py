"""A config's target is known, goes with its other settings, and with its student, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from export import ExportError
from export.targets import TARGETS
from qkd.cli import main
from qkd.pipeline.dryrun import check_distillation
from qkd.progress import Silent
from qkd.stages.export import StudentFile, student_files
from qkd.testing import tiny_config, write_npz_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz_set(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize(
    ("settings", "files"),
    [
        ({}, {"student": StudentFile("ort")}),
        ({"target": "onnxruntime>=1.17"}, {"student": StudentFile("ort", "onnxruntime>=1.17")}),
        ({"target": "onnxruntime-web"}, {"student": StudentFile("ort", "onnxruntime-web")}),
        (
            {"target": "openvino"},
            {"student": StudentFile("ort"), "student.openvino": StudentFile("ort", "openvino")},
        ),
        ({"target": "iree"}, {"student": StudentFile("ort"), "student.iree": StudentFile("qcdq", "iree")}),
        (
            {"target": "iree", "preprocess": "inside"},
            {
                "student": StudentFile("ort"),
                "student.iree": StudentFile("qcdq", "iree"),
                "student.iree.uint8": StudentFile("qcdq", "iree"),
            },
        ),
        ({"flavor": "qcdq"}, {"student": StudentFile("ort"), "student.qcdq": StudentFile("qcdq")}),
    ],
)
def test_a_target_decides_the_files(folder: Path, settings: dict[str, Any], files: dict[str, StudentFile]) -> None:
    config = tiny_config(folder, {f"export.{key}": value for key, value in settings.items()})
    assert student_files(config) == files and next(iter(student_files(config))) == "student"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target": "tensorflow"}, "must be one of onnxruntime>=1.17, onnxruntime"),
        ({"target": "onnxruntime>=1.2"}, "onnxruntime 1.2 is too old"),
        ({"target": "iree", "flavor": "qonnx"}, "`target: iree` has flavor `qcdq`; leave `flavor` out"),
        ({"target": "openvino", "pack": "packed"}, "takes weights as int8; leave `pack` out"),
        ({"target": "tvm", "linear": "matmul_nbits"}, "has no MatMulNBits; leave `linear` out"),
    ],
)
def test_what_does_not_go_together_is_a_fault(folder: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        tiny_config(folder, {f"export.{key}": value for key, value in settings.items()})


@pytest.mark.parametrize("target", ["finn", "hls4ml"])
def test_the_student_must_suit_the_target(folder: Path, target: str) -> None:
    with pytest.raises(ValidationError, match=f"student.quant.symmetric: target '{target}' needs symmetric: true"):
        tiny_config(folder, {"export.target": target})
    assert tiny_config(folder, {"export.target": target, "student.quant.symmetric": True}).export.chosen_target


NET = """from torch import nn

def build(num_classes, in_channels):
    body = [nn.Conv2d(in_channels, 4, 3), nn.Hardtanh(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(4, num_classes))
"""


def test_a_layer_that_the_target_lacks_is_found_before_training(eager: None, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    own = {"teacher.net": f"{tmp_path / 'net.py'}:build", "student.net": None}
    check_distillation(tiny_config(folder, {**own, "export.target": "tvm"}), Silent())
    with pytest.raises(ExportError, match="target 'openvino' does not compute hardtanh exactly; use another layer"):
        check_distillation(tiny_config(folder, {**own, "export.target": "openvino"}), Silent())


def test_a_file_that_cannot_be_written_is_found_before_training(eager: None, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET.replace("nn.Hardtanh()", "nn.SiLU()"))
    own = {"teacher.net": f"{tmp_path / 'net.py'}:build", "student.net": None, "student.quant.symmetric": True}
    with pytest.raises(ExportError, match="Sigmoid.*has no fixed-point form"):
        check_distillation(tiny_config(folder, {**own, "export.target": "hls4ml"}), Silent())


@pytest.mark.parametrize(("name", "words"), [("litert", "use onnxruntime")])
def test_a_refused_target_says_why(folder: Path, name: str, words: str) -> None:
    with pytest.raises(ValidationError, match=f"target '{name}' is refused: .*{words}"):
        tiny_config(folder, {"export.target": name})


def test_targets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "targets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(TARGETS)
    assert any("openvino 2026.4" in line for line in lines)
