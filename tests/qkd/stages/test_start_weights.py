"""A student that starts from a file of float weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from qkd.config import RunConfig
from qkd.named_files import file_faults
from qkd.pipeline import run_stages
from qkd.progress import Silent
from qkd.rundir import RunFolder
from qkd.stages.models import load_float_twin, load_student
from qkd.testing import tiny_config

NARROW = {"student.net": "lenet5", "teacher.train.epochs": 1, "student.train.epochs": 1}


def run(config: RunConfig, folder: Path) -> RunFolder:
    with RunFolder.open(config, runs_dir=folder) as opened:
        run_stages(opened, ("teacher", "search", "distill"), Silent())
        return opened


def test_it_ends_where_the_one_with_its_own_float_training_ends(data: Path, tmp_path: Path) -> None:
    own = run(tiny_config(data, {**NARROW, "student.float_train": {"epochs": 1, "lr": 0.01}}), tmp_path / "own")
    weights = own.path / "student" / "float" / "weights.safetensors"
    given = run(tiny_config(data, {**NARROW, "student.weights": str(weights)}), tmp_path / "given")
    states = [load_student(one).state_dict() for one in (own, given)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    twins = [load_float_twin(one) for one in (own, given)]
    assert twins[0] is not None and twins[1] is not None
    assert all(
        torch.equal(a, b) for a, b in zip(twins[0].state_dict().values(), twins[1].state_dict().values(), strict=True)
    )


def test_two_starts_are_refused(data: Path) -> None:
    with pytest.raises(ValidationError, match="name what the student starts from, and so does init `random`"):
        tiny_config(data, {**NARROW, "student.init": "random", "student.weights": "some.safetensors"})


def test_a_missing_file_is_told_before_training() -> None:
    faults = dict(file_faults({"student": {"weights": "nowhere.safetensors"}}))
    assert faults[("student", "weights")] == "no such file: nowhere.safetensors"
