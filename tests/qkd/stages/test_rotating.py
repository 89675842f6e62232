"""HSSAKD in the stages: branches that are trained and thrown away, a teacher that stays, resuming, exports."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from qkd.config import RunConfig
from qkd.config.conflicts import idle_faults
from qkd.files import read_safetensors, sha256_of
from qkd.methods.rotations.branches import JOINT_FILE, STAGE, load_branches
from qkd.nets import build_net
from qkd.progress import Silent
from qkd.roles.learner import StudentRole
from qkd.roles.nets import load_student, load_teacher, prepare_student
from qkd.run.folder import RunFolder
from qkd.stages import STAGES
from qkd.testing import run_tiny, tiny_config, write_npz_set
from qkd.training.assembly import Context
from qkd.training.loop import Trainer
from quantizers.calibrate import quant_layers

pytestmark = pytest.mark.usefixtures("unfused")

OFFLINE: dict[str, Any] = {
    "teacher.net": "wrn_16_1",
    "teacher.train": {"epochs": 1, "lr": 0.05},
    "student.net": "resnet8",
    "student.float_train": {"epochs": 1, "lr": 0.05},
    "student.train": {"epochs": 2, "lr": 0.01},
    "student.quant": {"weight_bits": 2, "act_bits": 2},
    "student.rotations": {"teacher_branches": {"train": {"epochs": 2, "lr": 0.05}}},
}
JOINT = {**OFFLINE, "student.rotations": {"teacher_branches": {"joint": True}}}
ONLINE = {**OFFLINE, "student.rotations": {"mode": "online"}, "student.quant": {"weight_bits": 4, "act_bits": 4}}
TERMS = [{"loss": "soft_target"}]
PARTS = {"cross_entropy", "branch_soft_target", "soft_target"}
WEIGHTS = ("task_weight", "branch_weight", "logit_weight", "joint_weight")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz_set(tmp_path_factory.mktemp("data"), train=48, test=16)


def experiment(data: Path, name: str, changes: dict[str, Any]) -> RunConfig:
    return tiny_config(data, copy.deepcopy({"name": name, **changes}))


@pytest.fixture(scope="module")
def offline(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("runs")
    return run_tiny(experiment(data, "offline", OFFLINE), folder, "teacher", "search", "distill")


def rows(run: RunFolder, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / name / "metrics.jsonl").read_text().splitlines()]


def test_a_run_trains_branches_then_the_student(offline: RunFolder) -> None:
    learned = rows(offline, f"student/{STAGE}")
    assert [set(row["terms"]) for row in learned] == [{"joint_labels"}] * 2
    assert learned[1]["train_loss"] < learned[0]["train_loss"]
    assert [set(row["terms"]) for row in rows(offline, "student")] == [PARTS] * 2
    found = json.loads((offline.path / "student" / STAGE / "result.json").read_text())
    assert found["taps"] == ["layer1", "layer2", "layer3"] and 0 <= found["val_accuracy"] <= 1
    assert found["epochs"] == 2


def test_the_teacher_is_what_its_stage_left(offline: RunFolder) -> None:
    before = sha256_of(offline.path / "teacher" / "weights.safetensors")
    (offline.path / "student" / STAGE / "weights.safetensors").unlink()
    assert "is missing" in offline.why_incomplete(STAGE) and "is missing" in offline.why_incomplete("distill")
    STAGES["distill"](offline, Silent())
    assert offline.is_complete(STAGE) and offline.is_complete("distill")
    assert sha256_of(offline.path / "teacher" / "weights.safetensors") == before


def test_a_training_of_branches_reads_the_teacher_only(
    offline: RunFolder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qkd.methods.rotations.training as module

    seen: list[torch.nn.Module] = []
    load = module.load_teacher
    monkeypatch.setattr(module, "load_teacher", lambda run: seen.append(load(run)) or seen[-1])
    run = run_tiny(experiment(data, "again", OFFLINE), tmp_path, "teacher", "search", "distill")
    (teacher,) = seen
    stored = read_safetensors(run.path / "teacher" / "weights.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in teacher.state_dict().items())
    assert not teacher.training and not any(one._forward_hooks for one in teacher.modules())
    # and the whole run gives the bits that the first gave
    for name in ("student/weights.safetensors", f"student/{STAGE}/weights.safetensors"):
        assert sha256_of(run.path / name) == sha256_of(offline.path / name)


def test_nothing_of_the_branches_is_in_the_student_or_its_file(offline: RunFolder) -> None:
    student = load_student(offline)
    net = build_net("resnet8", classes=4, channels=1, image_size=8)
    bare = prepare_student(offline.config, net, (1, 8, 8))
    assert set(student.state_dict()) == set(bare.state_dict())
    STAGES["export"](offline, Silent())
    graph = onnx.load(offline.path / "export" / "student.onnx").graph
    kernels = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]  # between (de)quantizers
    assert len(kernels) == len(quant_layers(student))
    assert [output.type.tensor_type.shape.dim[1].dim_value for output in graph.output] == [4]
    named = [*graph.node, *graph.initializer]
    assert named and not any("branch" in one.name for one in named)
    assert not any(16 in tensor.dims[:1] and "fc" in tensor.name for tensor in graph.initializer), "4 * classes"


def test_other_branches_ask_for_the_student_anew(offline: RunFolder) -> None:
    path = offline.path / "student" / STAGE / "weights.safetensors"
    good = path.read_bytes()
    branches = load_branches(offline, load_teacher(offline), StudentImages(offline).splits)
    assert branches is not None and len(branches) == 3
    path.write_bytes(good[:-1])
    try:
        with pytest.raises(ValueError, match=r"weights\.safetensors"):
            load_branches(offline, load_teacher(offline), StudentImages(offline).splits)
        path.unlink()
        with pytest.raises(FileNotFoundError, match="run the stage that writes it first"):
            load_branches(offline, load_teacher(offline), StudentImages(offline).splits)
    finally:
        path.write_bytes(good)


class StudentImages:
    """The images of a run."""

    def __init__(self, run: RunFolder) -> None:
        from qkd.data import load_splits

        self.splits = load_splits(run.config.data, seed=run.config.seed)


def test_calibration_sees_all_four_orientations(offline: RunFolder) -> None:
    start = StudentRole(Context(offline, StudentImages(offline).splits, torch.device("cpu"), Silent()))
    batch = next(iter(start._batches("calibration", 1)))
    assert len(batch) == 4 * offline.config.data.batch_size
    assert torch.equal(batch[1], torch.rot90(batch[0], 1, (1, 2)))


def test_joint_branches_learn_with_the_teacher(data: Path, tmp_path: Path) -> None:
    run = run_tiny(experiment(data, "joint", JOINT), tmp_path, "teacher", "search", "distill")
    assert [set(row["terms"]) for row in rows(run, "teacher")] == [{"cross_entropy", "joint_labels"}]
    assert [set(row["terms"]) for row in rows(run, "student")] == [PARTS] * 2
    assert not (run.path / "student" / STAGE).exists()
    stored = set(read_safetensors(run.path / "teacher" / "weights.safetensors"))
    assert stored == set(build_net("wrn_16_1", classes=4, channels=1, image_size=8).state_dict())
    path = run.path / "teacher" / JOINT_FILE
    path.write_bytes(path.read_bytes() + b" ")
    for stage in ("teacher", "distill"):
        assert run.why_incomplete(stage) == f"teacher/{JOINT_FILE} has changed"


def test_joint_branches_come_with_a_teacher_of_another_run(data: Path, tmp_path: Path, offline: RunFolder) -> None:
    """A teacher without them is refused before it is copied, as are branches that read other modules."""
    joint = run_tiny(experiment(data, "joint", JOINT), tmp_path, "teacher")
    second = {**JOINT, "teacher.run": str(joint.path)}
    with run_tiny(experiment(data, "second", second), tmp_path, "teacher", "search", "distill") as run:
        copies = [sha256_of(path / "teacher" / JOINT_FILE) for path in (joint.path, run.path)]
        assert copies[0] == copies[1] and [set(row["terms"]) for row in rows(run, "student")] == [PARTS] * 2
    with RunFolder.open(experiment(data, "third", {**JOINT, "teacher.run": str(offline.path)}), tmp_path) as run:
        with pytest.raises(ValueError, match="has no branches that learned with it.* use `train` in place of `joint`"):
            STAGES["teacher"](run, Silent())
        assert not run.is_complete("teacher")
    taps = {
        "teacher_branches": {"joint": True},
        "teacher_taps": ["layer1", "layer2"],
        "student_taps": ["layer1", "layer2"],
    }
    named = {**taps, "teacher_taps": ["layer1", "layer2", "layer3"], "student_taps": []}
    with RunFolder.open(experiment(data, "same", {**second, "student.rotations": named}), tmp_path) as run:
        STAGES["teacher"](run, Silent())
        assert run.is_complete("teacher")
    other = {**second, "student.rotations": taps}
    with (
        RunFolder.open(experiment(data, "fourth", other), tmp_path) as run,
        pytest.raises(
            ValueError, match=r"teacher_taps: layer1, layer2, but the branches of .* read layer1, layer2, layer3"
        ),
    ):
        STAGES["teacher"](run, Silent())


def test_peers_learn_from_each_other(data: Path, tmp_path: Path) -> None:
    run = run_tiny(experiment(data, "online", ONLINE), tmp_path, "teacher", "search", "distill")
    names = PARTS | {"joint_labels"}
    assert [set(row["terms"]) for row in rows(run, "student")] == [names | {f"peer_{name}" for name in names}] * 2
    before, after = (
        read_safetensors(run.path / place / "weights.safetensors") for place in ("teacher", "student/teacher")
    )
    assert before.keys() == after.keys() and not torch.equal(before["conv1.weight"], after["conv1.weight"])


@pytest.mark.parametrize("changes", [OFFLINE, JOINT, ONLINE], ids=["offline", "joint", "online"])
def test_an_interrupted_run_gives_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Interrupted in the middle of every training's epochs, with a checkpoint after each step."""
    steps = {f"{role}.checkpoint_every_s": 0 for role in ("teacher.train", "student.train")}
    if "train" in changes["student.rotations"].get("teacher_branches", {}):
        steps["student.rotations.teacher_branches.train.checkpoint_every_s"] = 0
    whole = run_tiny(experiment(data, "whole", {**changes, **steps}), tmp_path / "a",
                       "teacher", "search", "distill")  # fmt: skip
    run = RunFolder.open(experiment(data, "whole", {**changes, **steps}), tmp_path / "b")
    real, count = Trainer._step, [0]

    def stops(self: Trainer, *arguments: Any) -> Any:
        count[0] += 1
        if count[0] % 3 == 0:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", stops)
    interrupts = 0
    for stage in ("teacher", "search", "distill"):
        while not run.is_complete(stage):
            try:
                STAGES[stage](run, Silent())
            except KeyboardInterrupt:
                interrupts += 1
    assert interrupts >= 3
    for path in sorted(whole.path.rglob("*.safetensors")):
        if "checkpoint" not in path.parts:
            assert sha256_of(run.path / path.relative_to(whole.path)) == sha256_of(path), path


def test_phases_with_terms_of_their_own_go_without(data: Path, tmp_path: Path) -> None:
    phases = [
        {"name": "self_study", "epochs": 1, "terms": [{"loss": "cross_entropy"}]},
        {"name": "turned", "epochs": 1, "freeze_batch_norm": True},
    ]
    run = run_tiny(
        experiment(data, "phases", {**OFFLINE, "student.phases": phases}), tmp_path, "teacher", "search", "distill"
    )
    assert [set(row["terms"]) for row in rows(run, "student")] == [{"cross_entropy"}, PARTS]


def test_a_net_without_stages_needs_taps(data: Path, tmp_path: Path) -> None:
    changes = {**OFFLINE, "teacher.net": "lenet5_half"}
    with pytest.raises(ValueError, match=r"student\.rotations\.teacher_taps: the teacher's net has no stages"):
        run_tiny(experiment(data, "untapped", changes), tmp_path, "teacher", "search", "distill")


def test_branches_of_the_last_epoch_are_not_kept_with_a_teacher_of_another(data: Path) -> None:
    """Refused in new configs alone: older runs may have them."""
    config = experiment(data, "best", {**OFFLINE, **JOINT, "teacher.train.keep": "best"})
    assert any("keeps the teacher of one epoch and the branches of the last" in what for _, what in idle_faults(config))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"student.terms": [{"loss": "cross_entropy"}]}, "define the loss"),
        (
            {"student.phases": [{"epochs": 2, "terms": [{"loss": "cross_entropy"}]}]},
            "none would train on `rotations`",
        ),
        (
            {"student.phases": [{"epochs": 2, "teacher_terms": [{"loss": "cross_entropy"}]}]},
            "a phase has `teacher_terms`",
        ),
        ({**JOINT, "teacher.train": None, "teacher.weights": "w.safetensors"}, r"trains branches by its settings"),
        ({"student.phases": [{"epochs": 2, "combine": "clipped"}]}, "are for phases with `terms`"),
        ({"student.phases": [{"epochs": 2, "trains": "modules"}]}, "are for phases with `terms`"),
        (
            {"student.phases": [{"epochs": 1}, {"epochs": 1, "terms": TERMS, "meta": {"quiz_images": 8}}]},
            "a phase has `meta`",
        ),
        ({"student.auxiliary": {"train": {"epochs": 1}}}, "the student learns from `auxiliary`"),
        ({"teacher.members": 2}, r"teacher\.members: must be 1 with student\.rotations, got 2"),
        ({"teacher.train": None, "teacher.untrained": True}, "learn from a trained teacher"),
        ({**JOINT, "teacher.train.ema_decay": 0.9}, "averages the teacher, but not the branches"),
        ({**ONLINE, "student.rotations": {"mode": "online", **dict.fromkeys(WEIGHTS, 0)}}, "weight must be positive"),
    ],
)  # fmt: skip
def test_config_refusals(data: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        experiment(data, "refused", {**OFFLINE, **changes})


def test_joint_labels_alone_are_something_to_learn_from(data: Path) -> None:
    weights = {**dict.fromkeys(WEIGHTS, 0), "joint_weight": 1}
    config = experiment(data, "joint", {**ONLINE, "student.rotations": {"mode": "online", **weights}})
    assert config.student.rotations is not None and config.student.rotations.joint_weight == 1
