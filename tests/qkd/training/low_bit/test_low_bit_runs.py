"""Runs with every rule of low-bit weights, widths on the way and a copy that teaches: same bits after interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from export import check_parity
from qkd.config import RunConfig
from qkd.files import read_safetensors
from qkd.methods.widths import training as widths
from qkd.nets import build_net
from qkd.progress import Silent
from qkd.roles.learner import StudentRole
from qkd.roles.nets import load_student
from qkd.run.folder import RunFolder
from qkd.stages import STAGES
from qkd.testing import run_tiny, tiny_config
from qkd.training.loop import Trainer
from quantizers import QuantSpec, prepare
from quantizers.recipes.codes import low_bit_layers, weight_codes

pytestmark = pytest.mark.usefixtures("one_eager_thread")
ALL: dict[str, Any] = {
    "student.quant": {"weight_bits": 2, "act_bits": 2},
    "student.train": {"epochs": 3, "lr": 0.05, "checkpoint_every_s": 0, "ema_decay": 0.5},
    "student.low_bit": {
        "transition_rate": 0.02, "decay_by_bits": True, "dampening": 0.01, "oscillation_thresholds": [0.2, 0.1],
        "oscillation_momentum": 0.1, "reestimate_batches": 2,
    },
    "student.widths": [{"weight_bits": 4, "act_bits": 4, "epochs": 1}],
    "student.self_distillation": {},
}  # fmt: skip


class Interrupted(Exception):
    """Stands for a kill: nothing of the process survives but the folder."""


def config_of(data: Path, name: str, changes: dict[str, Any]) -> RunConfig:
    return tiny_config(data, {**changes, "name": name, "teacher.train": {"epochs": 1, "lr": 0.05}})


def steady(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def test_interrupted_runs_end_with_the_bits_of_a_whole_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_tiny(config_of(data, "whole", ALL), tmp_path, "teacher", "distill")
    step, left = Trainer._step, (2, 4, 4)  # 3 steps in the other width, 9 in the student's own

    def stopping(count: int) -> Any:
        def stopped(self: Trainer, *args: Any) -> Any:
            nonlocal count
            count -= 1
            if count < 0:
                raise Interrupted
            return step(self, *args)

        return stopped

    config, kills = config_of(data, "cut", ALL), 0
    with RunFolder.open(config, tmp_path) as run:
        STAGES["teacher"](run, Silent())
    for count in left:
        monkeypatch.setattr(Trainer, "_step", stopping(count))
        with pytest.raises(Interrupted), RunFolder.open(config, tmp_path) as run:
            STAGES["distill"](run, Silent())
        kills += 1
    monkeypatch.setattr(Trainer, "_step", step)
    cut = run_tiny(config, tmp_path, "distill")
    assert kills == 3
    for place in ("student/widths/0", "student"):
        expected, found = (read_safetensors(run.path / place / "weights.safetensors") for run in (whole, cut))
        assert all(torch.equal(expected[name], found[name]) for name in expected | found), place
        assert steady(whole.path / place / "metrics.jsonl") == steady(cut.path / place / "metrics.jsonl")
    facts = [row["facts"] for row in steady(whole.path / "student" / "metrics.jsonl")]
    assert facts[-1]["frozen_weights"] > 0 and facts[0]["transition_rate"] > 0


@pytest.mark.slow
def test_the_file_is_that_of_a_plain_student_and_computes_what_the_student_does(data: Path, tmp_path: Path) -> None:
    made = run_tiny(config_of(data, "made", ALL), tmp_path, "teacher", "distill", "export")
    plain = prepare(build_net("resnet8", classes=4, channels=1, image_size=8), QuantSpec(2, 2), torch.zeros(2, 1, 8, 8))
    state = read_safetensors(made.path / "student" / "weights.safetensors")
    assert state.keys() == plain.state_dict().keys()  # nothing of the rules, the widths or the copy
    parity = json.loads((made.path / "export" / "parity.json").read_text())
    assert parity["off"]["differing"] == 0 and not parity["off"]["fault"]
    student, images = load_student(made), torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    report = check_parity(student, made.path / "export" / "student.onnx", [images])
    assert report.passed, report.faults


def test_a_width_begins_with_the_weights_of_the_one_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: dict[str, dict[str, torch.Tensor]] = {}
    calibrate = StudentRole.calibrate

    def noting(self: StudentRole, *students: Any) -> None:
        starts[self.name] = {name: tensor.clone() for name, tensor in students[0].state_dict().items()}
        calibrate(self, *students)

    monkeypatch.setattr(StudentRole, "calibrate", noting)
    both = [{"weight_bits": bits, "act_bits": bits, "epochs": 1} for bits in (8, 4)]
    changes = {"student.quant": ALL["student.quant"], "student.widths": both}
    run = run_tiny(config_of(data, "w", changes), tmp_path, "teacher", "distill")
    assert list(starts) == ["widths-0", "widths-1", "student"]
    states = [read_safetensors(run.path / "teacher" / "weights.safetensors")]
    states += [widths.weights_of(run, index) for index in range(2)]
    for start, before in zip(starts.values(), states, strict=True):
        assert torch.equal(start["conv1.weight"], before["conv1.weight"])
        assert torch.equal(start["layer2.0.conv1.weight"], before["layer2.0.conv1.weight"])
    results = [json.loads((run.path / f"student/widths/{index}/result.json").read_text()) for index in range(2)]
    assert [(one["weight_bits"], one["epochs"]) for one in results] == [(8, 1), (4, 1)]


def test_a_missing_width_is_named(tmp_path: Path, data: Path) -> None:
    run = RunFolder(config_of(data, "w", ALL), tmp_path)
    with pytest.raises(FileNotFoundError, match="widths/0/weights.safetensors is missing.*qkd distill"):
        widths.weights_of(run, 0)


def test_statistics_are_estimated_once_before_batch_norm_is_frozen_or_at_the_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    reestimate = StudentRole.reestimate

    def noting(self: StudentRole, student: Any) -> None:
        seen.append((name, sum(layer.deployed_in_training for layer in low_bit_layers(student).values())))
        reestimate(self, student)

    monkeypatch.setattr(StudentRole, "reestimate", noting)
    for name, phases in {
        "settling": [{"epochs": 1}, {"epochs": 2, "freeze_batch_norm": True}], "open": [{"epochs": 3}]
    }.items():  # fmt: skip
        changes = {
            "student.quant": {"weight_bits": 4, "act_bits": 4}, "student.low_bit": {"reestimate_batches": 2},
            "student.train": {"epochs": 3, "lr": 0.01}, "student.phases": phases,
        }  # fmt: skip
        run_tiny(config_of(data, name, changes), tmp_path, "teacher", "distill")
    layers = len(low_bit_layers(load_student(RunFolder(config_of(data, "open", changes), tmp_path / "open"))))
    assert seen == [("settling", layers), ("open", 0)]


@pytest.mark.parametrize("keeping", [{"ema_decay": 0.9}, {"keep": "best"}, {"keep": "best", "ema_decay": 0.9}])
def test_the_student_that_is_kept_has_the_statistics_that_were_estimated_last(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeping: dict[str, Any]
) -> None:
    """Also if its weights are averages, or of an epoch before batch norm was frozen."""
    seen: list[dict[str, torch.Tensor]] = []
    reestimate, scores = StudentRole.reestimate, iter((0.5, 0.9, 0.1, 0.2))

    def noting(self: StudentRole, student: Any) -> None:
        reestimate(self, student)
        seen.append({name: one.clone() for name, one in student.named_buffers() if "running_" in name})

    monkeypatch.setattr(StudentRole, "reestimate", noting)
    monkeypatch.setattr("qkd.training.loop.accuracy", lambda *_: next(scores))
    changes = {
        "student.quant": {"weight_bits": 4, "act_bits": 4}, "student.low_bit": {"reestimate_batches": 2},
        "student.train": {"epochs": 3, "lr": 0.05, **keeping},
        "student.phases": [{"epochs": 1}, {"epochs": 2, "freeze_batch_norm": True}],
    }  # fmt: skip
    run = run_tiny(config_of(data, "kept", changes), tmp_path, "teacher", "distill")
    saved = read_safetensors(run.path / "student" / "weights.safetensors")
    assert len(seen) == (2 if "keep" in keeping else 1)
    assert all(torch.equal(saved[name], one) for name, one in seen[-1].items())


@pytest.mark.slow
def test_a_quantized_auxiliary_gives_its_features_and_follows_no_rules(data: Path, tmp_path: Path) -> None:
    """QFD: the features that the student learns from are on 4 bits, all else of their net on 8."""
    changes = {
        "student.quant": {"weight_bits": 2, "act_bits": 2},
        "student.low_bit": {"transition_rate": 0.02},
        "student.auxiliary": {
            "quant": {"weight_bits": 8, "act_bits": 8, "overrides": {"fc": {"act_bits": 4}}},
            "train": {"epochs": 1, "lr": 0.01}, "terms": [{"loss": "cross_entropy"}],
        },
        "student.terms": [{"loss": "cross_entropy"}, {"loss": "hint", "weight": 0.5, "taps": [["flatten", "flatten"]]}],
    }  # fmt: skip
    run = run_tiny(config_of(data, "qfd", changes), tmp_path, "teacher", "distill")
    rows = steady(run.path / "student" / "metrics.jsonl")
    assert all("transition_rate" in row["facts"] and row["terms"]["hint"] > 0 for row in rows)
    assert all(
        "transition_rate" not in row.get("facts", {}) for row in steady(run.path / "student/auxiliary/metrics.jsonl")
    )
    assert all(float(weight_codes(layer).abs().max()) <= 2 for layer in low_bit_layers(load_student(run)).values())
