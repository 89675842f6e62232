"""The examples run: the notebook cell by cell, programs with few epochs; the shell script's commands are valid."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import ROOT, commands_of

from qkd.cli import parse

EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def code_cells(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_there_are_notebooks_and_none_holds_outputs() -> None:
    cells = [cell for path in NOTEBOOKS for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    assert cells and all(not cell.get("outputs") for cell in cells if cell["cell_type"] == "code")


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    assert names and [name for name in sorted(names) if f"[{name}]({name})" not in listed] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one namespace, cell by cell, as a kernel does; what the notebook promises holds."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for number, cell in enumerate(code_cells(path)):
            exec(compile(cell, f"{path.name}, code cell {number}", "exec"), names)  # noqa: S102
    assert names["report"].passed and names["accuracy"](names["student"]) > 0.85
    assert (tmp_path / "student.onnx").stat().st_size < (tmp_path / "int8.onnx").stat().st_size
    assert "student.onnx" in said.getvalue()


def run_program(*words: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_plain_training_loop_runs(tmp_path: Path) -> None:
    said = run_program(str(EXAMPLES / "training_loop.py"), "--epochs", "3", folder=tmp_path)
    assert "the file computes what the student computes" in said and (tmp_path / "digits-w2a2.onnx").is_file()


@pytest.mark.slow
def test_the_data_free_example_runs(tmp_path: Path) -> None:
    epochs = [f"{key}.epochs=1" for key in ("teacher.train", "student.float_train", "student.train")]
    short = [*epochs, "teacher.train.warmup_epochs=0", "student.data_free.images_per_epoch=128"]
    said = run_program(str(EXAMPLES / "data_free.py"), "--config", "digits/data-free/noise", *short, folder=tmp_path)
    assert "The student saw no training image" in said


def test_the_commands_of_the_board_script_are_ones() -> None:
    text = (EXAMPLES / "on_a_board.sh").read_text(encoding="utf-8")
    commands = commands_of(text)
    assert [words[0] for words in commands] == ["bench", "report"]
    for words in commands:
        parse(words)
    subprocess.run(["bash", "-n", str(EXAMPLES / "on_a_board.sh")], check=True)
