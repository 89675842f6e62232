"""MetaDistil through the stages: the quiz is kept from the student, the teacher learns; what a config may not say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qkd.analysis.run_diagnosis import diagnose_target
from qkd.analysis.run_retrieval import _Reader
from qkd.config import PhaseConfig
from qkd.data import load_splits
from qkd.files import read_safetensors
from qkd.methods.phase_checks import phase_faults
from qkd.nets import build_net
from qkd.progress import Silent
from qkd.roles.guide import load_followed
from qkd.roles.learner import stretched_phases, student_images
from qkd.roles.nets import load_student, load_teacher, prepare_student
from qkd.roles.phases import distillation
from qkd.run.folder import RunFolder
from qkd.stages.export import _inputs, float_nets
from qkd.testing import run_tiny, tiny_config
from qkd.training import Batch

TAUGHT = [
    {"name": "meta", "epochs": 2, "meta": {"quiz_images": 12, "teacher_start_epoch": 1}},
    {"name": "settling", "epochs": 1, "freeze_batch_norm": True},
]
CHANGES: dict[str, Any] = {
    "student.net": "lenet5",
    "student.init": "float",
    "student.float_train": {"epochs": 1},
    "student.train.epochs": 3,
    "student.quant.weight_bits": 2,
    "student.quant.act_bits": 2,
    "student.phases": TAUGHT,
    "student.float_train.keep_checkpoint": True,
    "student.train.keep_checkpoint": True,
    "teacher.train.keep_checkpoint": True,
}


@pytest.fixture(scope="module")
def done(unfused: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_tiny(tiny_config(data, CHANGES), tmp_path_factory.mktemp("runs"), "teacher", "search", "distill")


def test_the_teacher_is_taught_and_kept_beside_the_student(done: RunFolder) -> None:
    lines = (done.path / "student" / "metrics.jsonl").read_text().splitlines()
    facts = [json.loads(line).get("facts", {}) for line in lines]
    assert ["quiz_loss" in one for one in facts] == [False, True, False]
    assert facts[1]["quiz_loss"] > 0
    before = load_teacher(done).state_dict()
    after = read_safetensors(done.path / "student" / "teacher" / "weights.safetensors")
    parameters = {name for name, _ in load_teacher(done).named_parameters()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name not in parameters)
    assert any(not torch.equal(before[name], after[name]) for name in parameters)


def test_whatever_looks_at_the_run_sees_the_teacher_as_it_was_taught(done: RunFolder) -> None:
    taught = read_safetensors(done.path / "student" / "teacher" / "weights.safetensors")
    followed = load_followed(done)
    assert followed.words == "resnet8, taught along with the student" and followed.note == ""
    report = diagnose_target(
        str(done.path), runs_dir=done.path, overrides=(), load=lambda: done.config, progress=Silent()
    )
    assert report.net == followed.words
    reader = _Reader(done, None, 8, 8, Silent())
    for net in (followed.model, float_nets(done)["teacher"], reader._teacher()):
        state = net.state_dict()
        assert all(torch.equal(taught[name], state[name]) for name in taught)
    assert done.path / "student" / "teacher" / "weights.safetensors" in _inputs(done)


def test_before_it_is_taught_it_is_said_that_it_will_be(data: Path, tmp_path: Path) -> None:
    run = run_tiny(tiny_config(data, CHANGES), tmp_path, "teacher")
    followed = load_followed(run)
    assert followed.words == "resnet8" and "which is not trained yet; this is its initial state" in followed.note
    run.close()


def test_the_student_never_sees_the_quiz(done: RunFolder) -> None:
    whole = load_splits(done.config.data, seed=done.config.seed)
    own = student_images(done.config, whole)
    assert own.quiz is not None and len(own.quiz) == 12 and len(own.train) == len(whole.train) - 12
    for place in ("student", "student/float"):
        state = json.loads(next((done.path / place / "checkpoint").glob("*.json")).read_text())
        assert own.fingerprint in json.dumps(state) and whole.fingerprint not in json.dumps(state)
    state = json.loads(next((done.path / "teacher" / "checkpoint").glob("*.json")).read_text())
    assert whole.fingerprint in json.dumps(state)


def test_the_student_has_nothing_of_it(done: RunFolder) -> None:
    names = load_student(done).state_dict().keys()
    assert names and not any("teacher" in name or "quiz" in name for name in names)


def test_a_run_without_it_has_all_images(data: Path) -> None:
    config = tiny_config(data)
    whole = load_splits(config.data, seed=0)
    assert student_images(config, whole) is whole


def test_too_large_a_quiz_names_the_key(data: Path) -> None:
    config = tiny_config(data, {**CHANGES, "student.phases": [{"epochs": 3, "meta": {"quiz_images": 5000}}]})
    with pytest.raises(ValueError, match=r"student\.phases: meta\.quiz_images: 5000 of"):
        student_images(config, load_splits(config.data, seed=0))


def test_a_search_begins_to_teach_in_proportion(data: Path) -> None:
    phases = [{"epochs": 10, "meta": {"quiz_images": 12, "teacher_start_epoch": 6}}]
    config = tiny_config(data, {**CHANGES, "student.train.epochs": 10, "student.phases": phases})
    (phase,) = stretched_phases(config, 5)
    assert phase.meta is not None and (phase.epochs, phase.meta.teacher_start_epoch) == (5, 3)
    assert phase.meta.quiz_images == 12
    late = [
        {"epochs": 9, "meta": {"quiz_images": 12, "teacher_start_epoch": 8}},
        {"name": "settling", "epochs": 1, "freeze_batch_norm": True},
    ]
    config = tiny_config(data, {**CHANGES, "student.train.epochs": 10, "student.phases": late})
    first, second = stretched_phases(config, 5)
    assert first.meta is not None and (first.epochs, first.meta.teacher_start_epoch, second.epochs) == (4, 3, 1)


def test_a_quiz_that_begins_late_teaches_at_the_full_rate(data: Path, tmp_path: Path) -> None:
    phases = [{"epochs": 6}, {"epochs": 4, "meta": {"quiz_images": 12, "teacher_lr": 0.05}}]
    train = {"epochs": 10, "lr": 0.1, "schedule": "step", "milestones": [0.5, 0.8]}
    config = tiny_config(data, {**CHANGES, "student.train": train, "student.phases": phases})
    splits = student_images(config, load_splits(config.data, seed=0))
    net = build_net("resnet8", classes=4, channels=1, image_size=8)
    student = prepare_student(config, net, (1, 8, 8))
    made = distillation(config, config.student.phases, student, copy.deepcopy(net), None, net=net, splits=splits)
    schedule = made.phases[1].step._rates  # type: ignore[attr-defined]
    nothing = torch.zeros(0)
    rates = [schedule(Batch(nothing, nothing, nothing, epoch, 0)).teacher_lr for epoch in (6, 7, 8, 9)]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.005])


TEACHING = {"quiz_images": 12}


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (
            [{"epochs": 1, "meta": TEACHING}, {"epochs": 2, "meta": {"quiz_images": 16}}],
            r"`meta.quiz_images` must be the same in all phases, got \[12, 16\]",
        ),
        (
            [{"epochs": 1, "meta": TEACHING}, {"epochs": 2, "meta": {**TEACHING, "teacher_momentum": 0.5}}],
            r"`meta.teacher_momentum` must be the same",
        ),
        (
            [{"epochs": 1, "meta": TEACHING}, {"epochs": 2, "teacher_terms": [{"loss": "cross_entropy"}]}],
            "`meta` and `teacher_terms` both train the teacher",
        ),
        ([{"epochs": 3, "meta": {**TEACHING, "teacher_start_epoch": 3}}], "ends with epoch 2 .* never be taught"),
        ([{"epochs": 3, "meta": {"quiz_images": 0}}], "greater than"),
        ([{"epochs": 3, "meta": {**TEACHING, "inner_lr": -1}}], "greater than or equal to 0"),
        ([{"epochs": 3, "meta": {**TEACHING, "order": "third"}}], "'second' or 'first'"),
    ],
)
def test_what_a_config_may_not_say(data: Path, phases: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(data, {**CHANGES, "student.phases": phases})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.peers": {"nets": [{"net": "lenet5"}]}}, "can have `meta` or peers, not both"),
        ({"teacher.members": 2}, "meta needs teacher.members 1"),
        ({"student.rotations": {"mode": "online"}}, "a phase has `meta`, which moves the teacher away"),
        ({"student.auxiliary": {"train": {"epochs": 1}}}, "meta cannot be combined with student.auxiliary"),
        (
            {
                "student.phases": [],
                "student.auxiliary": {
                    "train": {"epochs": 1},
                    "phases": [{"epochs": 1, "meta": {"quiz_images": 12}}],
                },
            },
            "`phases` with meta are for the student",
        ),
    ],
)
def test_what_it_does_not_go_with(data: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(data, {**CHANGES, **changes})


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"terms": [{"loss": "cross_entropy"}]}, "no term of the phase reads the teacher"),
        ({"terms": [{"loss": "cross_entropy"}, {"loss": "soft_target", "weight": 0}]}, "no term of the phase reads"),
        (
            {"terms": [{"loss": "soft_target"}, {"loss": "singular_vector", "taps": [["a", "a"], ["b", "b"]]}]},
            "no gradient flows through singular_vector into the teacher",
        ),
        ({"trains": "modules", "terms": [{"loss": "hint", "taps": [["a", "a"]]}]}, "the student does not learn"),
        ({"combine": "clipped", "terms": [{"loss": loss} for loss in ("cross_entropy", "soft_target")]}, "plain sum"),
    ],
)
def test_what_terms_it_cannot_teach_with(phase: dict[str, Any], message: str) -> None:
    phases = [PhaseConfig.model_validate({"epochs": 1, "meta": TEACHING, **phase})]
    faults = [(key, what) for _, key, what in phase_faults((), phases)]
    assert [key for key, _ in faults] == ["meta"] and message in faults[0][1]
