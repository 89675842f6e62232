"""What a checkpoint resumes from: the same settings, or a refusal that names them; other kernels are reported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import beside
import pytest
import torch

from qkd.config import TrainConfig
from qkd.data import Splits
from qkd.progress import Silent
from qkd.testing import synthetic_splits
from qkd.training import Job, TrainingError, fit
from qkd.training import origin as under_test
from qkd.training.checkpoint import CheckpointStore
from qkd.training.origin import kernels_of, other_kernels, settings_of

make_job: Callable[..., Job] = beside.load(Path(__file__).with_name("test_loop.py")).make_job


@pytest.fixture(scope="module")
def splits() -> Splits:
    return synthetic_splits(train=72, val=18)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"train": {"lr": 0.05}}, "train.lr: 0.1 then, 0.05 now"),
        ({"train": {"weight_decay": 0.0}}, "train.weight_decay"),
        ({"train": {"epochs": 4}}, "train.epochs: 3 then, 4 now"),
        ({"role": "student_float"}, "role: 'teacher' then, 'student_float' now"),
        ({"settings": {"student.terms[0].weight": 2.0}}, "student.terms[0].weight: 1.0 then, 2.0 now"),
        ({"batch_size": 8}, "batch_size: 16 then, 8 now"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_name(
    tmp_path: Path, splits: Splits, changes: dict[str, Any], part: str
) -> None:
    first = {"settings": {"student.terms[0].weight": 1.0, "a key of that version": 1}}
    fit(make_job(tmp_path, splits, **first), Silent())
    size = changes.pop("batch_size", None)
    job = make_job(tmp_path, splits, **{**first, **changes})
    if size is not None:
        job = replace(job, data=job.data.model_copy(update={"batch_size": size}))
    with pytest.raises(ValueError, match="other settings") as caught:
        fit(job, Silent())
    assert part in str(caught.value) and "delete" in str(caught.value)


def test_folders_that_were_swapped_are_noticed(tmp_path: Path, splits: Splits) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        fit(make_job(tmp_path / name, splits, seed=seed), Silent())
    shutil.rmtree(tmp_path / "a" / "checkpoint")
    (tmp_path / "b" / "checkpoint").rename(tmp_path / "a" / "checkpoint")
    with pytest.raises(ValueError, match="seed: 1 then, 0 now"):
        fit(make_job(tmp_path / "a", splits), Silent())


def test_how_often_it_is_saved_and_newer_keys_do_not_matter(tmp_path: Path, splits: Splits) -> None:
    fit(make_job(tmp_path, splits), Silent())
    fit(make_job(tmp_path, splits, train={"checkpoint_every_s": 30}, settings={"newer": 1}), Silent())


def test_a_checkpoint_of_before_has_no_settings_and_serves(tmp_path: Path, splits: Splits) -> None:
    job = make_job(tmp_path, splits)
    fit(job, Silent())
    store = CheckpointStore(tmp_path / "checkpoint", warn=lambda _: None)
    made = store.load()
    assert made is not None and made.state["settings"]["seed"] == 0
    old = {key: value for key, value in made.state.items() if key not in ("settings", "kernels")}
    store.save(store.steps()[-1] + 1, replace(made, state=old))
    fit(make_job(tmp_path, splits), Silent())


def test_other_kernels_are_told_of_once_they_have_run(
    tmp_path: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(job: Job) -> None:
        phase, steps = job.phases[0], iter(range(6))

        def step(batch: Any) -> Any:
            if next(steps) == 5:
                raise TrainingError("stop", epoch=1, step=1)
            return phase.step(batch)

        fit(replace(job, phases=(replace(phase, step=step),)), Silent())

    scale = torch.nn.Parameter(torch.ones(()))
    monkeypatch.setattr(under_test, "is_fused", lambda: True)
    with pytest.raises(TrainingError):
        cut(make_job(tmp_path, splits, scales=lambda: [scale]))
    monkeypatch.setattr(under_test, "is_fused", lambda: False)
    warned: list[str] = []
    progress = Silent()
    progress.warn = warned.append  # type: ignore[method-assign]
    fit(make_job(tmp_path, splits, scales=lambda: [scale]), progress)
    assert warned == ["teacher: quantizer kernels: 'fused' then, 'eager' now; results may now differ in the last bits"]


def test_augmentation_is_recorded_and_no_reason_to_warn(tmp_path: Path, splits: Splits) -> None:
    job = make_job(tmp_path, splits)
    found = kernels_of(job)
    assert found["device"] == "cpu" and found["threads"] == torch.get_num_threads()
    assert "quantizer kernels" not in found  # a float net has none
    assert other_kernels({**found, "augmentation": "compiled"}, {**found, "augmentation": "not compiled"}) == []
    assert other_kernels({**found, "threads": 99}, found) == [f"threads: 99 then, {found['threads']} now"]
    assert set(settings_of(job, 16)) >= {f"train.{key}" for key in TrainConfig.model_fields if "checkpoint" not in key}
