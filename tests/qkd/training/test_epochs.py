"""What is kept and written at the end of each epoch: the best weights, CSV, TensorBoard, a line."""

from __future__ import annotations

import csv
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qkd.cli import main
from qkd.config import LogConfig
from qkd.config.binding import config_text
from qkd.pipeline.dryrun import check_distillation
from qkd.progress import Progress, Silent
from qkd.run.log import logged
from qkd.testing import run_tiny, tiny_config, write_npz_set
from qkd.training.epochs.best import BestWeights
from qkd.training.epochs.log import EpochLog, csv_of, epoch_line

ROW = {
    "epoch": 2, "phase": "tutoring", "lr": 0.05, "train_loss": 0.5, "train_accuracy": 0.75, "val_accuracy": None,
    "terms": {"cross_entropy": 0.25}, "seconds": 3.0,
}  # fmt: skip


def test_an_epoch_in_a_line() -> None:
    assert epoch_line("student", ROW, 9) == ("student, epoch 2/9 (tutoring): loss 0.5, train 75.0 %, rate 0.05, 3 s")
    assert "validation 50.0 %" in epoch_line("student", {**ROW, "val_accuracy": 0.5}, 9)


def test_a_table_has_the_columns_of_all_epochs() -> None:
    lines = list(csv.DictReader(io.StringIO(csv_of([ROW, {**ROW, "epoch": 3, "facts": {"w_t": 1.5}}]))))
    assert [line["terms.cross_entropy"] for line in lines] == ["0.25", "0.25"]
    assert [line["facts.w_t"] for line in lines] == ["", "1.5"]
    assert csv_of([]) == "\n"


def test_the_best_weights_are_those_of_the_best_epoch() -> None:
    net, best = torch.nn.Linear(2, 2), BestWeights()
    seen = []
    for epoch, accuracy in enumerate((0.5, 0.75, 0.25, 0.75, 0.5), start=1):
        with torch.no_grad():
            net.weight.fill_(epoch)
        best.offer(net, epoch=epoch, accuracy=accuracy)
        seen.append(best.epoch)
    assert seen == [1, 2, 2, 4, 4], "of equally good ones the last"
    tensors, values = best.state()
    other, again = torch.nn.Linear(2, 2), BestWeights()
    again.load(tensors, values, torch.device("cpu"))
    other.load_state_dict(again.tensors)
    assert other.weight.eq(4).all() and (again.epoch, again.accuracy) == (4, 0.75)


def test_a_training_keeps_them_and_says_which_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation gets worse after the first epoch here: the weights are those of a training of one epoch."""
    scores = iter((0.9, 0.1, 0.2))
    monkeypatch.setattr("qkd.training.loop.accuracy", lambda *_: next(scores))
    data = write_npz_set(tmp_path / "data")
    keeping = {"teacher.train.epochs": 3, "teacher.train.keep": "best", "teacher.train.schedule": "constant"}
    run = run_tiny(tiny_config(data, keeping), tmp_path / "runs", "teacher")
    text = (run.path / "teacher" / "result.json").read_text(encoding="utf-8")
    assert re.search(r'"kept_epoch": 1\b', text)
    rows = list(csv.DictReader(io.StringIO((run.path / "teacher" / "metrics.csv").read_text(encoding="utf-8"))))
    assert [row["val_accuracy"] for row in rows] == ["0.9", "0.1", "0.2"]
    short = tiny_config(data, {**keeping, "teacher.train.epochs": 1, "name": "short"})
    monkeypatch.undo()
    once = run_tiny(short, tmp_path / "runs", "teacher")
    files = [one.path / "teacher" / "weights.safetensors" for one in (run, once)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_keeping_the_best_needs_images_to_choose_by(tmp_path: Path) -> None:
    changes = {"data.val_fraction": 0.0, "teacher.train.keep": "best"}
    with pytest.raises(ValueError, match="`keep: best` needs validation images, but there are none"):
        run_tiny(tiny_config(write_npz_set(tmp_path / "data"), changes), tmp_path / "runs", "teacher")


def test_images_to_choose_by_are_missed_before_any_training(tmp_path: Path) -> None:
    changes = {"data.val_fraction": 0.0, "student.train.keep": "best"}
    with pytest.raises(ValueError, match="student: `keep: best` needs validation images, but there are none"):
        check_distillation(tiny_config(write_npz_set(tmp_path / "data"), changes), Silent())


def test_tensorboard_gets_each_epoch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder.endswith("tensorboard")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            pass

    module: Any = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = EpochLog(tmp_path, "teacher", LogConfig(tensorboard=True, csv=False))
    rows = [{**ROW, "epoch": epoch} for epoch in (1, 2, 3)]
    for count in (2, 2, 3):  # as where a training resumes after its second epoch
        log.write(rows[:count])
    assert {step for _, _, step in written} == {3}
    assert ("teacher/terms.cross_entropy", 0.25, 3) in written and len(written) == 5
    assert not (tmp_path / "metrics.csv").exists()
    written.clear()
    fresh = EpochLog(tmp_path, "teacher", LogConfig(tensorboard=True, csv=False))
    for count in (0, 1, 2):
        fresh.write(rows[:count])
    assert sorted({step for _, _, step in written}) == [1, 2] and len(written) == 10


def test_tensorboard_that_is_missing_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(config_text(tiny_config(write_npz_set(tmp_path / "data"), {"log.tensorboard": True})))
    monkeypatch.setattr("qkd.checking.config_files.find_spec", lambda _: None)
    assert main(["validate", str(file)]) == 2
    assert "config.log.tensorboard: TensorBoard is missing: pip install" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_an_epoch_has_a_line_on_terminals_too_and_in_the_log(stream: io.StringIO) -> None:
    progress, told = Progress(stream), list[str]()
    progress.tell = told.append
    with progress.track(2, "teacher", "images") as tracker:
        tracker.update(1)
        progress.epoch(tracker, "teacher, epoch 1/2")
    assert "  teacher, epoch 1/2\n" in stream.getvalue() and told == ["teacher, epoch 1/2"]


def test_the_log_of_a_run_has_lines_and_crashes(tmp_path: Path) -> None:
    progress = Silent()
    with logged(progress, tmp_path, "qkd run"):
        progress.stage("teacher", "news")
    with pytest.raises(ZeroDivisionError), logged(progress, tmp_path, "qkd run"):
        progress.warn("careful")
        print(1 // 0)
    with pytest.raises(KeyboardInterrupt), logged(progress, tmp_path, "qkd run"):
        raise KeyboardInterrupt
    lines = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    words = [line[21:] for line in lines]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)
    assert words[1:3] == ["== teacher: news", "done"] and "  warning: careful" in words
    assert any(word.startswith("Traceback") for word in words) and "failed: ZeroDivisionError" in words
    assert words[-1] == "interrupted" and progress.tell is None


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.log").symlink_to(tmp_path / "elsewhere")
    with logged(Silent(), tmp_path, "qkd run"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_command_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(config_text(tiny_config(write_npz_set(tmp_path / "data"))))
    assert main(["teacher", str(file), "--runs-dir", str(tmp_path / "runs")]) == 0
    text = (tmp_path / "runs" / "tiny" / "run.log").read_text(encoding="utf-8")
    assert "teacher, epoch 2/2 (supervised): loss" in text
    assert "data: 48 training images; held out: 16 for validation (0.25 of 64 images)" in text
