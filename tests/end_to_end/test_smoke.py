"""The shipped smoke config, from teacher to report, as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from export.lowbit import availability
from qkd.cli import main


def qkd(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qkd.cli", *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


class Shell:
    """Runs commands in this process, in its own folder: quicker than one process each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
        self._monkeypatch.chdir(folder)
        self._monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        self._capsys.readouterr()
        code = main(arguments)
        captured = self._capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, captured.out, captured.err)


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("smoke")
    done = qkd("run", "configs/digits/smoke.yaml", "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_the_result_holds_what_was_asked_for(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    run = folder / "runs" / "digits-smoke"
    teacher, student, *under_low_bit = result["models"]
    assert (teacher["role"], student["role"]) == ("teacher (= FP32 twin)", "student w2a2")
    assert student["agreement"] == 1.0
    assert 0.1 <= student["test_accuracy"] <= 1 and 0.1 <= teacher["test_accuracy"] <= 1
    assert student["size_bytes"] == (run / "export" / "student.onnx").stat().st_size < teacher["size_bytes"] / 4
    assert 0 < student["p10_ms"] <= student["median_ms"] <= student["p90_ms"]
    assert Path(result["report"]).samefile(run / "report.html")
    assert [row["name"] for row in result["layers"]][0::9] == ["conv1", "fc"]
    assert all(row["parity_steps"] is not None for row in result["layers"])
    if availability().is_offered:
        (row,) = under_low_bit
        assert row["role"] == "student w2a2, low-bit provider" and row["test_accuracy"] == student["test_accuracy"]
        assert row["median_ms"] > 0 and row["size_bytes"] == student["size_bytes"]
        assert (
            "LowBitExecutionProvider computes 9 of 10 layers: the outputs of 359 images"
            in (run / "report.md").read_text()
        )
    else:
        assert under_low_bit == []


@pytest.mark.slow
def test_a_trained_student_gives_the_same_on_the_whole_test_set_with_the_low_bit_provider(tmp_path: Path) -> None:
    """Longer trained than the smoke run, and deeper: every logit of every test image, and every layer that it takes."""
    if not (found := availability()).is_offered:
        pytest.skip(found.reason)
    epochs = [f"{role}.train.epochs=8" for role in ("teacher", "student")]
    done = qkd("run", "digits/w2a2", "name=low", *epochs, "--until", "export", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    parity = json.loads((tmp_path / "runs" / "low" / "export" / "parity.json").read_text())
    compared = parity["provider"]
    assert parity["passed"] and parity["accuracy"] > 0.8 and compared["faults"] == []
    assert (compared["images"], compared["differing"], compared["claimed_layers"]) == (359, 0, 21)
    assert compared["shown"] == compared["claimed"] > 150
    assert sum(layer["differing"] for layer in compared["layers"]) == 0
    assert "LowBitExecutionProvider computes" in done.stderr and "of 359 images" in done.stderr


def test_every_file_is_there(finished: tuple[Path, dict[str, Any]]) -> None:
    run = finished[0] / "runs" / "digits-smoke"
    names = [
        "config.yaml", "environment.json", "teacher/weights.safetensors", "teacher/metrics.jsonl",
        "teacher/result.json", "search/teacher.schedule.yaml", "student/weights.safetensors",
        "student/metrics.jsonl", "student/result.json", "export/student.onnx", "export/teacher.onnx",
        "export/parity.json", "export/layers.json", "export/sample.npz", "bench/local.json", "report.html", "report.md",
    ]  # fmt: skip
    assert [name for name in names if not (run / name).is_file()] == []
    for name in ("student", "teacher"):
        onnx.checker.check_model(onnx.load(run / "export" / f"{name}.onnx"))
    page = (run / "report.html").read_text()
    assert page.count("<svg") == 8 and "http" not in page


def test_again_it_costs_nothing_and_changes_nothing(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    run = folder / "runs" / "digits-smoke"
    logs = (".lock", "run.log")  # each call is written down
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name not in logs}
    done = qkd("run", "digits/smoke", "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == result
    assert done.stderr.count("already complete") == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_closing_table_goes_to_stdout_and_talk_to_stderr(
    finished: tuple[Path, dict[str, Any]], shell: Shell
) -> None:
    done = shell("report", "digits/smoke", folder=finished[0])
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert " x smaller than FP32" in lines[0] and lines[1].startswith("model") and lines[-1].startswith("report: ")
    assert lines[3].startswith("student w2a2")
    rows = 1 + availability().is_offered
    assert all(line.startswith("note: ") for line in lines[3 + rows : -1]) and "359 images" in done.stdout
    assert "==" in done.stderr and "==" not in done.stdout


def test_another_config_under_the_same_name_is_refused(finished: tuple[Path, dict[str, Any]], shell: Shell) -> None:
    done = shell("run", "digits/smoke", "student.train.lr=0.5", folder=finished[0])
    assert done.returncode == 2
    assert (
        "student.train.lr: 0.01 there, 0.5 here" in done.stderr
        and "faults" not in done.stderr
        and "Traceback" not in done.stderr
    )


def test_an_altered_file_is_exported_again(finished: tuple[Path, dict[str, Any]], shell: Shell) -> None:
    run = finished[0] / "runs" / "digits-smoke"
    original = (run / "export" / "student.onnx").read_bytes()
    (run / "export" / "student.onnx").write_bytes(original[:-1])
    done = shell("export", "digits/smoke", folder=finished[0])
    assert done.returncode == 0 and "export/student.onnx has changed" in done.stderr
    assert (run / "export" / "student.onnx").read_bytes() == original


def test_a_dry_run_keeps_nothing(tmp_path: Path, shell: Shell) -> None:
    done = shell("run", "digits/smoke", "--dry-run", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    checks = {check["name"]: check["outcome"] for check in json.loads(done.stdout)["checks"]}
    assert list(checks) == ["data", "teacher", "student", "phase tutoring", "phase settling", "export"]
    assert "gradients are finite" in checks["phase settling"] and "load and run" in checks["export"]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_finds_a_tap_that_is_not_there(tmp_path: Path, shell: Shell) -> None:
    terms = "student.terms=[{loss: similarity_preserving, taps: [[layer9, layer3]]}]"
    done = shell("run", "digits/smoke", terms, "--dry-run", folder=tmp_path)
    assert done.returncode == 2
    assert "layer9" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("student.terms=[{loss: similarity_preserving, taps: [[layer9, layer3]]}]", "no module 'layer9'; did you mean"),
        ("student.terms=[{loss: top_classes, options: {classes: 99}}]", "top_classes: classes must be 1 to 10"),
        ("student.phases=[{epochs: 2, meta: {quiz_images: 100000}}]", "quiz_images: 100000"),
    ],
)
def test_what_only_nets_and_data_show_is_told_before_the_first_stage(
    tmp_path: Path, shell: Shell, change: str, message: str
) -> None:
    done = shell("run", "digits/smoke", "student.train.epochs=2", change, folder=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "== teacher" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_tries_the_students_own_float_training(tmp_path: Path, shell: Shell) -> None:
    own = ("student.net=lenet5_half", "student.float_train={epochs: 1, lr: 0.1}")
    done = shell("run", "digits/smoke", *own, "--dry-run", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    checks = {check["name"]: check["outcome"] for check in json.loads(done.stdout)["checks"]}
    assert checks["student"].startswith("in float: loss ") and "3 files load and run" in checks["export"]
