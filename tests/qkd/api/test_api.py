"""`import qkd`: runs, finished runs and distillation as functions and values; importing stays free."""

from __future__ import annotations

import ast
import copy
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qkd
from qkd.config.binding import config_text
from qkd.failures import ConfigError, UsageError
from qkd.losses import soft_target_loss
from qkd.progress import Silent
from qkd.testing import tiny_config, write_npz_set
from quantizers import QuantSpec, Student, integer_view, prepare


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a config and its run, up to the student."""
    folder = tmp_path_factory.mktemp("api")
    config = tiny_config(write_npz_set(folder / "data"), {"teacher.train.epochs": 1, "student.train.epochs": 1})
    (folder / "tiny.yaml").write_text(config_text(config), encoding="utf-8")
    run = qkd.run(folder / "tiny.yaml", runs_dir=folder / "runs", until="distill", progress=Silent())
    assert run.path == folder / "runs" / "tiny"
    return folder


def test_a_run_is_values(home: Path) -> None:
    run = qkd.load_run(home / "runs" / "tiny")
    assert isinstance(run.student, Student) and not run.teacher.training
    splits = run.images()
    assert run.teacher(torch.zeros(2, *splits.image_shape)).shape == (2, len(splits.classes))
    assert {row.role for row in run.report.models} == {"teacher (= FP32 twin)", "student w4a4"}
    assert "test accuracy (95 %)" in str(run) and repr(run).startswith("<Run ") and "<pre>" in run._repr_html_()
    assert run.onnx.name == "student.onnx" and run.config.name == "tiny"


def test_configs_in_any_form_and_overrides(home: Path) -> None:
    config = qkd.load_run(home / "runs" / "tiny").config
    again = qkd.run(config, runs_dir=home / "runs", until="distill", progress=Silent())
    assert again.path == home / "runs" / "tiny"
    plain = config.model_dump(mode="json")
    for overrides in ({"name": "other", "teacher.train.lr": 0.04}, ["name=other", "teacher.train.lr=0.04"]):
        other = qkd.run(plain, overrides, runs_dir=home / "runs", until="teacher", progress=Silent())
        assert (other.config.name, other.config.teacher.train.lr) == ("other", 0.04)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="until must be one of teacher, search"):
        qkd.run(plain, until="end")
    with pytest.raises(ConfigError, match="config.student.quant: missing"):
        qkd.run({**plain, "student": {}})
    with pytest.raises(ConfigError, match="is not a run folder; .* has"):
        qkd.load_run(home)


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    made = [nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
            for _ in range(2)]  # fmt: skip
    return made[0], made[1]


def batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(16) % 2
    return [(torch.randn(16, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1), labels) for _ in range(count)]


def test_a_low_bit_student_follows_a_teacher_in_a_loop_of_ones_own() -> None:
    teacher, net = nets()
    qkd.distill(teacher, net, batches(), terms=["cross_entropy"], train={"epochs": 4, "lr": 0.05})
    student = prepare(net, QuantSpec(weight_bits=4, act_bits=4), batches(1)[0][0])
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    teacher.train()
    terms = ["cross_entropy", {"loss": "soft_target", "weight": 2.0, "options": {"temperature": 4}},
             {"loss": "similarity_preserving", "taps": [["2", "2"]]}]  # fmt: skip
    found = qkd.distill(student, teacher, (batches(), batches(1)), terms=terms, train={"epochs": 5, "lr": 0.05})
    assert found.rows[-1]["loss"] < found.rows[0]["loss"] and found.accuracy is not None and found.accuracy > 0.8
    assert list(found.rows[0]) == ["epoch", "loss", "cross_entropy", "soft_target", "similarity_preserving", "accuracy"]
    assert "soft_target" in str(found).splitlines()[0] and len(str(found).splitlines()) >= 6
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items()), "it is only read"
    assert teacher.training and all(parameter.requires_grad for parameter in teacher.parameters())
    assert not student.training and len(integer_view(student).nodes) > 3, "it can be exported"


def test_only_the_last_epochs_of_a_low_bit_student_have_a_lower_rate_as_in_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates: list[float] = []
    monkeypatch.setattr("qkd.api.distilling.set_learning_rate", lambda _, rate: rates.append(rate))
    teacher, net = nets()
    student = prepare(net, QuantSpec(weight_bits=4, act_bits=4), batches(1)[0][0])
    for one in (net, student):
        qkd.distill(one, teacher, batches(2), train={"epochs": 2, "lr": 0.05, "schedule": "constant"})
    assert rates == pytest.approx([*[0.05] * 4, *[0.05] * 2, *[0.005] * 2])


def test_one_batch_by_itself_is_a_batch() -> None:
    (student, net), (images, labels) = nets(), batches(1)[0]
    alone, listed = (copy.deepcopy(student) for _ in range(2))
    for trained, given in ((alone, (images, labels)), (listed, [(images, labels)])):
        qkd.distill(trained, net, given, terms=["cross_entropy"], train={"epochs": 1, "lr": 0.05})
    assert all(torch.equal(one, other) for one, other in zip(alone.parameters(), listed.parameters(), strict=True))
    with pytest.raises(TypeError, match=r"pairs \(images, labels\) of tensors, the first one is a tensor \["):
        qkd.distill(student, net, images, terms=["soft_target"])


def test_what_cannot_be_distilled_is_said() -> None:
    student, teacher = nets()
    with pytest.raises(TypeError, match="must have a length.* got a generator"):
        qkd.distill(student, teacher, (one for one in batches()))
    with pytest.raises(ValueError, match="no training batches"):
        qkd.distill(student, teacher, [])
    with pytest.raises(ValueError, match="unknown loss 'soft_targets'; did you mean `soft_target`"):
        qkd.distill(student, teacher, batches(), terms=["soft_targets"])
    with pytest.raises(
        ValueError, match=r"terms\[0\]\.loss: logit_relation .* is 0 for fewer than 3, but batches have 2"
    ):
        qkd.distill(
            student, teacher, [(images[:2], labels[:2]) for images, labels in batches()], terms=["logit_relation"]
        )
    with pytest.raises(ValueError, match="epochs"):
        qkd.distill(student, teacher, batches(), train={"epochs": 0})
    broken = [(torch.full((4, 1, 8, 8), torch.inf), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(ValueError, match="the images of epoch 1, batch 1, hold NaN or infinity"):
        qkd.distill(student, teacher, broken, terms=["cross_entropy"])
    with pytest.raises(RuntimeError, match="the loss is .* in epoch [123], batch [1-9]: lower `lr`"):
        qkd.distill(
            *nets(),
            batches(),
            terms=["cross_entropy"],
            train={"epochs": 3, "lr": 1e6, "warmup_epochs": 0, "clip_grad_norm": None},
        )
    with pytest.raises(ValueError, match=r"student and teacher are one object: give copy\.deepcopy"):
        qkd.distill(teacher, teacher, batches())
    with pytest.raises(TypeError, match="terms: must be names of `qkd ls losses`.*got <function"):
        qkd.distill(student, teacher, batches(), terms=[lambda *_: 0])  # type: ignore[list-item]


def test_a_student_that_shares_modules_with_its_teacher_is_refused() -> None:
    """Training it would move the teacher's statistics, and leave the shared weights frozen."""
    shared = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    teacher, student = (nn.Sequential(shared, nn.Flatten(), nn.Linear(72, 3)) for _ in range(2))
    with pytest.raises(ValueError, match=r"student and teacher share 0\.0\.weight and 6 more, so that training one"):
        qkd.distill(student, teacher, batches(), train={"epochs": 1})
    qkd.distill(copy.deepcopy(student), teacher, batches(), train={"epochs": 1})
    copied = copy.deepcopy(teacher)
    copied.load_state_dict(teacher.state_dict(), assign=True)  # other objects, the same memory
    with pytest.raises(ValueError, match="student and teacher share"):
        qkd.distill(copied, teacher, batches(), train={"epochs": 1})
    head = teacher[2].requires_grad_(False)  # as SimKD does: the teacher's own head, which does not learn
    before = head.weight.clone()
    body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), head)
    qkd.distill(body, teacher, batches(), train={"epochs": 1})
    assert torch.equal(before, head.weight)


class Once:
    """Batches with a length that can be read once."""

    def __init__(self, given: list[Any]) -> None:
        self.count, self.rest = len(given), iter(given)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        return self.rest


class Resetting(Once):
    """Batches that start again whenever they are asked for an iterator, and are that iterator."""

    def __init__(self, given: list[Any]) -> None:
        super().__init__(given)
        self.given = given

    def __iter__(self) -> Any:
        self.rest = iter(self.given)
        return self

    def __next__(self) -> Any:
        return next(self.rest)


def test_batches_that_run_out_are_no_training() -> None:
    student, teacher = nets()
    for one in (student, copy.deepcopy(teacher)):
        with pytest.raises(ValueError, match=r"epoch [12] got no training batches, although their length is 3"):
            qkd.distill(one, teacher, Once(batches(3)), train={"epochs": 2})
    with pytest.raises(TypeError, match=r"validation batches are read after every epoch, but a generator can be read"):
        qkd.distill(copy.deepcopy(teacher), teacher, (batches(), (one for one in batches())), train={"epochs": 1})
    with pytest.raises(ValueError, match="there were no validation batches, or they can be read once only"):
        qkd.distill(copy.deepcopy(teacher), teacher, (batches(), Once(batches(1))), train={"epochs": 2})
    found = qkd.distill(copy.deepcopy(teacher), teacher, (batches(), []), train={"epochs": 1})
    assert found.accuracy is None
    again = Resetting(batches(1))
    assert qkd.distill(copy.deepcopy(teacher), teacher, (Resetting(batches()), again), train={"epochs": 2}).accuracy
    broken = [(torch.full((4, 1, 8, 8), torch.nan), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(ValueError, match="validation images hold NaN or infinity"):
        qkd.distill(copy.deepcopy(teacher), teacher, (batches(), broken), train={"epochs": 1})


def test_terms_that_teach_the_student_nothing_are_refused() -> None:
    student, teacher = nets()
    with pytest.raises(ValueError, match="none of them reads the student, so the student learns nothing"):
        qkd.distill(student, teacher, batches(), terms=["graph_attention"])
    with pytest.raises(TypeError, match=r"terms: must be a list, got the text 'soft_target'"):
        qkd.distill(student, teacher, batches(), terms="soft_target")


def test_a_head_that_begins_with_the_shares_of_the_classes_is_no_log_softmax() -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    nn.init.zeros_(student[1].weight)
    student[1].bias.data = torch.tensor([0.4, 0.6]).log()
    qkd.distill(student, nets()[1], batches(), train={"epochs": 1})


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.LogSoftmax(1)])
def test_a_float_student_that_gives_probabilities_is_refused(end: nn.Module) -> None:
    with pytest.raises(ValueError, match="the student returns .*probabilities: it ends in"):
        qkd.distill(nn.Sequential(nn.Flatten(), nn.Linear(64, 3), end), nets()[1], batches(), train={"epochs": 1})


@pytest.mark.parametrize(
    ("asked", "named"),
    [({"precision": "bf16"}, "precision='bf16'"), ({"ema_decay": 0.9, "keep": "best"}, "ema_decay=0.9, keep='best'"),
     ({"memory_format": "channels_last"}, "memory_format='channels_last'")],
)  # fmt: skip
def test_settings_that_would_change_nothing_are_refused(asked: dict[str, Any], named: str) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ValueError, match=f"{named} has no effect here"):
        qkd.distill(net, net, batches(), train={"epochs": 1, **asked})


def test_losses_have_the_names_of_configs() -> None:
    logits = torch.randn(4, 3), torch.randn(4, 3)
    expected = soft_target_loss(*logits, temperature=4.0)
    assert torch.equal(qkd.loss("soft_target", temperature=4.0)(*logits), expected)
    with pytest.raises(UsageError, match="no loss 'soft_targets'; did you mean 'soft_target'"):
        qkd.loss("soft_targets")
    with pytest.raises(ValueError, match="must be positive, .*got -1"):
        qkd.loss("soft_target", temperature=-1)
    with pytest.raises(UsageError, match="with a module that learns"):
        qkd.loss("hint")


def test_rooms_stay_modules() -> None:
    """`qkd.run(...)` and `from qkd.run.folder import RunFolder` both work, in whatever order."""
    assert importlib.import_module("qkd.run.folder").RunFolder and callable(qkd.run)
    assert importlib.import_module("qkd.distill").PLACES and callable(qkd.distill)


def test_importing_is_free_and_the_version_is_there() -> None:
    code = "import sys, qkd; print(qkd.__version__); print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    version, heavy = done.stdout.splitlines()
    assert version[0].isdigit() and ast.literal_eval(heavy) == []
    done = subprocess.run(
        [sys.executable, "-m", "qkd", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == f"qkd {version}\n"


@pytest.mark.parametrize(
    ("train", "fault"),
    [({"epoch": 2}, 'train.epoch: unknown key; did you mean `epochs`?'),
     ({"epochs": 2.0}, "train.epochs: must be a whole"), ({"epochs": 0, "lr": "fast"}, "train.lr: must be a number")],
)  # fmt: skip
def test_arguments_have_the_faults_of_configs(train: dict[str, Any], fault: str) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    batch = [(torch.rand(4, 1, 2, 2), torch.arange(4) % 2)]
    with pytest.raises(ConfigError) as caught:
        qkd.distill(net, net, batch, train=train)
    assert fault in str(caught.value) and "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"temp": 3}, "soft_target: temp: unknown option"),
        ({"temperature": 0}, "soft_target: temperature: must be positive"),
    ],
)
def test_a_fault_of_a_loss_names_its_option(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        qkd.loss("soft_target", **options)
