"""Learning rates of MetaDistil over a training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qkd.config import MetaConfig, TrainConfig
from qkd.methods.meta_distil.schedule import MetaSchedule
from qkd.methods.meta_distil.step import MetaRates
from qkd.training import Batch, learning_rate

STEPS = 10


def rates(train: TrainConfig, *, lr_factor: float = 1.0, first_epoch: int = 0, **meta: Any) -> list[MetaRates]:
    meta_config = MetaConfig(quiz_images=10, **meta)
    schedule = MetaSchedule(train, meta_config, steps_per_epoch=STEPS, lr_factor=lr_factor, first_epoch=first_epoch)
    nothing = torch.zeros(0)
    return [
        schedule(Batch(nothing, nothing, nothing, epoch, step))
        for epoch in range(train.epochs)
        for step in range(STEPS)
    ]


def test_as_published_for_images() -> None:
    train = TrainConfig(epochs=240, lr=0.05, schedule="step", milestones=(150 / 240, 180 / 240, 210 / 240))
    found = rates(train, teacher_lr=0.05, teacher_start_epoch=150)[::STEPS]
    for epoch, inner, teacher in (
        (0, 0.05, None), (149, 0.05, None), (150, 0.005, 0.05), (180, 0.0005, 0.005), (239, 0.00005, 0.0005)
    ):  # fmt: skip
        assert found[epoch].inner_lr == pytest.approx(inner)
        assert found[epoch].teacher_lr == (None if teacher is None else pytest.approx(teacher))


def test_a_phase_that_begins_late_counts_as_a_teacher_that_does() -> None:
    train = TrainConfig(epochs=240, lr=0.05, schedule="step", milestones=(150 / 240, 180 / 240, 210 / 240))
    late, named = rates(train, first_epoch=150), rates(train, teacher_start_epoch=150)
    assert [one.teacher_lr for one in late[150 * STEPS :]] == [one.teacher_lr for one in named[150 * STEPS :]]
    assert late[150 * STEPS].teacher_lr == pytest.approx(0.05)


@pytest.mark.parametrize("start", [0, 1, 2, 5, 7])
@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 2.0])
def test_the_teacher_reaches_its_rate_and_never_more(start: int, schedule: Any, warmup: float) -> None:
    train = TrainConfig(epochs=8, lr=0.1, schedule=schedule, warmup_epochs=warmup)
    found = rates(train, teacher_lr=0.03, teacher_start_epoch=start)
    assert all(one.teacher_lr is None for one in found[: start * STEPS])
    taught = [one.teacher_lr for one in found[start * STEPS :] if one.teacher_lr is not None]
    assert len(taught) == (8 - start) * STEPS and max(taught) == pytest.approx(0.03)


def test_the_assumed_step_goes_as_the_student() -> None:
    train = TrainConfig(epochs=4, lr=0.1, warmup_epochs=1)
    student = [learning_rate(train, step, STEPS) for step in range(4 * STEPS)]
    assert [one.inner_lr for one in rates(train)] == pytest.approx(student)
    assert [one.inner_lr for one in rates(train, inner_lr=0.2)] == pytest.approx([2 * lr for lr in student])
    assert [one.inner_lr for one in rates(train, lr_factor=0.1)] == pytest.approx([0.1 * lr for lr in student])
    assert {one.inner_lr for one in rates(train, inner_lr=0.0)} == {0.0}


def test_an_epoch_needs_a_step() -> None:
    with pytest.raises(ValueError, match="steps_per_epoch=0"):
        MetaSchedule(TrainConfig(epochs=1), MetaConfig(quiz_images=1), steps_per_epoch=0)
