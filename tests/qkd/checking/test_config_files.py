"""Files that a config names: each missing one is a fault, and so is each fault of a schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qkd.checking import file_faults
from qkd.cli import main

SCHEDULE = "format: qkd-schedule\nversion: 1\nsegments: [{epochs: 3, ops: [[Rotat, 0.5, 3], [Invert, 2.0, 3]]}]\n"


def texts(data: dict[str, Any]) -> dict[str, str]:
    return {".".join(map(str, where)): what for where, what in file_faults(data)}


def test_what_is_there_is_no_fault(tmp_path: Path) -> None:
    for name in ("w.safetensors", "train.npz", "test.npz"):
        (tmp_path / name).write_bytes(b"")
    good = {"data": {"name": "npz", "path": str(tmp_path)}, "teacher": {"weights": str(tmp_path / "w.safetensors")}}
    assert texts(good) == {}
    assert texts({"data": {"name": "digits"}, "teacher": {}, "student": {"agent": {"policy": "crop"}}}) == {}


def test_ill_typed_sections_are_left_to_the_schema() -> None:
    assert texts({"data": 3, "teacher": [1], "student": {"agent": None}}) == {}
    assert texts({"data": {"name": "npz", "path": 4}, "teacher": {"weights": 5}}) == {}


@pytest.mark.parametrize("name", ["npz", "folder"])
def test_a_data_set_without_its_folder_is_a_fault(name: str, tmp_path: Path) -> None:
    assert "missing" in texts({"data": {"name": name}})["data.path"]
    assert "no such folder" in texts({"data": {"name": name, "path": str(tmp_path / "nowhere")}})["data.path"]


def test_a_folder_without_a_data_set_in_it_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / ".hidden").mkdir()
    found = texts({"data": {"name": "folder", "path": str(tmp_path)}})["data.path"]
    assert "has no class folders" in found and str(tmp_path) in found
    (tmp_path / "test").mkdir()
    assert "train: no such folder" in texts({"data": {"name": "folder", "path": str(tmp_path)}})["data.path"]
    (tmp_path / "train" / "cat").mkdir(parents=True)
    assert texts({"data": {"name": "folder", "path": str(tmp_path)}}) == {}
    (tmp_path / "train.npz").write_bytes(b"")
    assert "has no test.npz" in texts({"data": {"name": "npz", "path": str(tmp_path)}})["data.path"]


def test_missing_weights_are_a_fault(tmp_path: Path) -> None:
    found = texts({"teacher": {"weights": str(tmp_path / "none.safetensors")}})
    assert list(found) == ["teacher.weights"] and "none.safetensors" in found["teacher.weights"]


def test_every_fault_of_a_schedule_is_told(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(SCHEDULE)
    faults = list(file_faults({"student": {"agent": {"policy": "file", "schedule": str(file)}}}))
    assert [where for where, _ in faults] == [("student", "agent", "schedule")] * 2
    assert "Rotate" in faults[0][1] and "2.0" in faults[1][1]


def test_the_students_schedule_is_missed_before_the_teacher_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ("student.agent={policy: file, schedule: none.yaml}", "teacher.weights=none.pth")
    for command in (["validate"], ["run", "--runs-dir", str(tmp_path)]):
        assert main([command[0], "digits/smoke", *changes, *command[1:]]) == 2
        printed = capsys.readouterr().err
        assert "qkd: 2 faults:" in printed and "none.yaml" in printed and "none.pth" in printed
    assert list(tmp_path.iterdir()) == []
