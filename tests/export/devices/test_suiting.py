"""A student's file is measured in the runtime that it was written for, and a float file in each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from export import export_float, export_onnx
from export.devices.providers import entries_of
from export.devices.suiting import suited, target_name, without_student
from export.runtime import CPU
from qkd.cli import main
from quantizers import QuantSpec, calibrate, prepare

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def paths(eager: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, images = tmp_path_factory.mktemp("files"), torch.randn(8, 1, 4, 4)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    student = prepare(net, QuantSpec(), images[:2])
    calibrate(student, images)
    export_float(net, images[:2], folder / "float.onnx")
    export_onnx(student.eval(), images[:2], folder / "student.onnx")
    export_onnx(student, images[:2], folder / "openvino.onnx", target="openvino")
    return {name: folder / f"{name}.onnx" for name in ("float", "student", "openvino")}


def test_files_say_what_they_are_for(paths: dict[str, Path]) -> None:
    assert {name: target_name(path) for name, path in paths.items()} == {
        "float": None, "student": "onnxruntime", "openvino": "openvino",
    }  # fmt: skip


def test_a_file_runs_where_it_is_right(paths: dict[str, Path]) -> None:
    entries = suited(entries_of(list(paths), (CPU, "openvino")), paths)
    assert [entry.title for entry in entries] == ["float", "float, OpenVINO", "student", "openvino, OpenVINO"]
    plain = entries_of(["student", "openvino"], (CPU,))
    assert suited(plain, paths) == plain  # no other runtime is asked for: ONNX Runtime runs both


def test_students_that_are_left_out_are_named(paths: dict[str, Path]) -> None:
    def told(*names: str) -> list[str]:
        here = {name: paths[name] for name in names}
        return without_student(suited(entries_of(list(here), (CPU, "openvino")), here), here)

    assert told("float", "student", "openvino") == [] and told("float") == []
    assert told("float", "student") == [
        "no student here is for openvino, so only float files are measured there; export one with "
        "export.target=openvino"
    ]


def test_a_runtime_without_a_file_is_an_error(paths: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="none of these files is for openvino, .* export.target=openvino"):
        suited(entries_of(["student"], ("openvino",)), paths)
    assert main(["bench", str(paths["student"]), "--runtime", "mnn"]) == 2
    assert (
        "--runtime mnn: not known; runtimes that can be measured here: onnxruntime, openvino" in capsys.readouterr().err
    )
    assert main(["bench", str(paths["student"]), "--runtime", "openvino", "--provider", "cpu"]) == 2
    assert "--provider is ONNX Runtime's" in capsys.readouterr().err
