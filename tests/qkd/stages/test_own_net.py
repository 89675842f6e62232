"""A net of one's own through every command: beside the config, copied into the run, reopened where it is gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qkd.cli import main
from qkd.files import read_metadata, read_safetensors
from qkd.nets import build_net, save_weights
from qkd.pipeline.dryrun import check_distillation
from qkd.progress import Silent
from qkd.roles.nets import load_float_twin, why_no_twin
from qkd.testing import run_tiny, tiny_config, write_npz_set

NET = """
from torch import nn


def build(num_classes, in_channels, width=4):
    body = [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
"""
CONFIG = """
data: {{name: npz, path: {data}, batch_size: 16}}
teacher: {{net: "mynet.py:build", net_options: {{width: 6}}, train: {{epochs: 1}}, agent: {{policy: none}}}}
student:
  net: mynet.py:build
  quant: {{weight_bits: 4, act_bits: 4}}
  float_train: {{epochs: 1}}
  train: {{epochs: 1}}
  agent: {{policy: none}}
  calibration_batches: 1
bench: {{warmup: 1, rounds: 2}}
threads: 1
device: cpu
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a config, its net, and a finished run."""
    folder = tmp_path_factory.mktemp("own")
    data = write_npz_set(folder / "data", train=32, test=16)
    (folder / "mynet.py").write_text(NET, encoding="utf-8")
    (folder / "my first.yaml").write_text(CONFIG.format(data=data), encoding="utf-8")
    assert main(["run", str(folder / "my first.yaml"), "--runs-dir", str(folder / "runs")]) == 0
    return folder


def test_the_run_has_the_file_and_its_name_is_that_of_the_config(home: Path) -> None:
    run = home / "runs" / "my-first"
    (copy,) = (run / "nets").iterdir()
    assert (copy / "mynet.py").read_text(encoding="utf-8") == NET
    assert f"net: nets/{copy.name}/mynet.py:build" in (run / "config.yaml").read_text(encoding="utf-8")
    facts = read_metadata(run / "teacher" / "weights.safetensors")
    assert facts["net"] == f'nets/{copy.name}/mynet.py:build{{"width": 6}}'
    assert 'mynet.py:build{"width": 6}' in (run / "report.md").read_text(encoding="utf-8")
    assert json.loads((run / "student" / "result.json").read_text())["net"] == "mynet.py:build"


@pytest.mark.parametrize(
    "words",
    [["run"], ["report"], ["bench", "--on", "local"], ["cost"], ["diagnose", "--limit", "16"], ["export"],
     ["match", "--student-taps", "2", "--teacher-taps", "2"], ["retrieve", "--limit", "16"], ["teacher"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_every_command_takes_a_run_that_has_moved_without_the_original(
    home: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(home / "runs" / "my-first", tmp_path / "moved" / "other")
    hidden = home / "hidden.py"
    (home / "mynet.py").rename(hidden)
    try:
        code = main([words[0], str(moved), *words[1:]])
    finally:
        hidden.rename(home / "mynet.py")
    assert code == 0, capsys.readouterr().err


def test_a_second_student_takes_the_teacher_by_one_command(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, first = home / "runs", home / "runs" / "my-first"
    words = ["name=third", f"teacher.run={first}", "--runs-dir", str(runs)]
    assert main(["run", str(home / "my first.yaml"), "--until", "teacher", *words]) == 0
    assert main(["run", str(home / "my first.yaml"), "--dry-run", f"teacher.run={first}"]) == 0
    words = ["name=second", f"teacher.run={first}", "student.quant.weight_bits=2", "--runs-dir", str(runs)]
    assert main(["distill", str(home / "my first.yaml"), *words]) == 2  # nothing has been made yet
    assert "teacher (not run)" in capsys.readouterr().err
    assert main(["run", str(home / "my first.yaml"), "--until", "distill", *words]) == 0
    assert "not retrained" in capsys.readouterr().err
    assert (runs / "second" / "nets").is_dir()


def test_a_changed_net_is_another_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = home / "mynet.py"
    file.write_text(NET + "\n# better\n", encoding="utf-8")
    try:
        assert main(["report", str(home / "my first.yaml"), "--runs-dir", str(home / "runs")]) == 2
    finally:
        file.write_text(NET, encoding="utf-8")
    assert (
        "holds a run with another config" in (text := capsys.readouterr().err) and "teacher.net: 'nets/mynet-" in text
    )


def test_a_wrong_name_is_said_by_validate(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(home / "my first.yaml"), f"teacher.net={home}/mynet.py:bild"]) == 2
    assert "has no `bild`; did you mean `build`?" in capsys.readouterr().err


FROZEN = """
from torch import nn


def build(num_classes, in_channels):
    first = nn.Conv2d(in_channels, 4, 3, padding=1)
    first.weight.requires_grad_(False)
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)]
    return nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), *end)
"""


@pytest.mark.parametrize("phase", [{"teacher_terms": [{"loss": "cross_entropy"}]}, {"meta": {"quiz_images": 8}}])
def test_frozen_parameters_of_a_teacher_stay_frozen_while_it_is_taught(tmp_path: Path, phase: dict[str, Any]) -> None:
    (tmp_path / "frozen.py").write_text(FROZEN, encoding="utf-8")
    changes = {"teacher.net": f"{tmp_path}/frozen.py:build", "student.phases": [{"epochs": 2, **phase}]}
    config = tiny_config(
        write_npz_set(tmp_path / "data"), {**changes, "teacher.train.epochs": 1, "student.train.epochs": 2}
    )
    run = run_tiny(config, tmp_path, "teacher", "search", "distill")
    before, after = (
        read_safetensors(run.path / place / "weights.safetensors") for place in ("teacher", "student/teacher")
    )
    assert (before["0.weight"] == after["0.weight"]).all() and (before["5.weight"] != after["5.weight"]).any()


def test_a_teacher_that_is_frozen_as_a_whole_cannot_be_taught(tmp_path: Path) -> None:
    text = FROZEN.replace("    return nn", "    made = nn").rstrip("\n") + "\n    return made.requires_grad_(False)\n"
    (tmp_path / "ice.py").write_text(text, encoding="utf-8")
    taught = {
        "student.phases": [{"epochs": 1, "teacher_terms": [{"loss": "cross_entropy"}]}],
        "student.train.epochs": 1,
    }
    changes = {"teacher.net": f"{tmp_path}/ice.py:build", "teacher.train": None, "teacher.untrained": True, **taught}
    config = tiny_config(
        write_npz_set(tmp_path / "data"), {**changes, "student.net": "lenet5_half", "student.init": "random"}
    )
    with pytest.raises(ValueError, match="CoStudy teaches the teacher, but all of its parameters are frozen"):
        run_tiny(config, tmp_path, "teacher", "search", "distill")


LATE = """
import torch
from torch import nn


class Late(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.body, self.steps = nn.Conv2d(in_channels, 4, 3, padding=1), 0
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        self.steps += self.training
        x = self.body(x).relu().mean((2, 3)) * (1 if self.steps < 5 else 9)
        return self.fc(x)
"""


def test_what_is_stored_is_what_was_trained(tmp_path: Path) -> None:
    """A counter that matters late passes the check of a new net; the file itself shows it."""
    (tmp_path / "late.py").write_text(LATE, encoding="utf-8")
    changes = {"teacher.net": f"{tmp_path}/late.py:Late", "teacher.train.epochs": 4}
    config = tiny_config(write_npz_set(tmp_path / "data"), changes)
    with pytest.raises(
        ValueError, match=r"teacher: loaded from .*, the net computes other logits than the trained one"
    ):
        run_tiny(config, tmp_path, "teacher")


def test_lazy_modules_are_shaped_in_every_net(tmp_path: Path) -> None:
    text = FROZEN.replace("    first.weight.requires_grad_(False)\n", "").replace(
        "nn.Conv2d(in_channels, 4", "nn.LazyConv2d(4"
    )
    (tmp_path / "lazy.py").write_text(text, encoding="utf-8")
    config = tiny_config(write_npz_set(tmp_path / "data"), {"teacher.net": f"{tmp_path}/lazy.py:build"})
    check_distillation(config, Silent())
    run_tiny(config, tmp_path, "teacher", "search", "distill")


def test_a_student_whose_start_has_changed_has_no_float_twin(tmp_path: Path) -> None:
    (tmp_path / "mynet.py").write_text(NET, encoding="utf-8")
    data, start = write_npz_set(tmp_path / "data"), tmp_path / "start.safetensors"
    save_weights(build_net(f"{tmp_path}/mynet.py:build", classes=4, channels=1, image_size=8), start)
    changes = {"student.net": f"{tmp_path}/mynet.py:build", "student.weights": str(start)}
    run = run_tiny(tiny_config(data, changes), tmp_path, "teacher", "search", "distill")
    assert why_no_twin(run) == "" and load_float_twin(run) is not None
    save_weights(build_net(f"{tmp_path}/mynet.py:build", classes=4, channels=1, image_size=8), start)
    assert "has changed since the student started from it" in why_no_twin(run) and load_float_twin(run) is None
    start.unlink()
    assert "cannot be read" in why_no_twin(run) and load_float_twin(run) is None
