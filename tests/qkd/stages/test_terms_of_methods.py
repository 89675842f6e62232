"""Methods that are terms, through real trainings: KDDG's filter off and on for everything, LONDON's loss that falls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkd.files import read_safetensors
from qkd.losses import lipschitz_loss
from qkd.progress import Silent
from qkd.roles.learner import StudentRole
from qkd.run.folder import RunFolder
from qkd.stages import STAGES
from qkd.testing import run_tiny, tiny_config

pytestmark = pytest.mark.usefixtures("eager")
DOMAINS: dict[str, Any] = {
    "data.domains": {"upright": {}, "turned": {"rotate": 20}, "red": {"color": [1, 0.2, 0.2]}},
    "data.unseen_domain": "red",
}
STUDENT: dict[str, Any] = {
    "student.net": "lenet5_half",
    "student.init": "random",
    "student.train.weight_decay": 0.0,
    "student.quant.weight_bits": 2,
    "student.quant.act_bits": 2,
}


@pytest.fixture(scope="module")
def teacher(eager: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001
    with run_tiny(tiny_config(data, {**DOMAINS, "name": "teacher"}), tmp_path_factory.mktemp("t"), "teacher") as run:
        return run.path


@pytest.fixture
def trained(data: Path, teacher: Path, tmp_path: Path) -> Any:
    """Return what trains a student of the common teacher by some terms, and gives its run folder."""

    def train(name: str, *terms: dict[str, Any], **changes: Any) -> Path:
        config = tiny_config(data, {**DOMAINS, **STUDENT, "name": name, "student.terms": list(terms), **changes})
        with RunFolder.open(config, tmp_path) as run:
            run.adopt("teacher", teacher)
            STAGES["search"](run, Silent())
            STAGES["distill"](run, Silent())
            return run.path

    return train


def weights(run: Path) -> dict[str, Tensor]:
    return read_safetensors(run / "student" / "weights.safetensors")


def filtered(criterion: str) -> dict[str, Any]:
    return {"loss": "filtered_soft_target", "weight": 0.9, "options": {"temperature": 4, "criterion": criterion}}


TASK = {"loss": "cross_entropy", "weight": 0.1}


def test_a_filter_that_is_off_is_plain_distillation_to_the_bit(trained: Any) -> None:
    plain = weights(trained("plain", TASK, {"loss": "soft_target", "weight": 0.9, "options": {"temperature": 4}}))
    off, confident = (weights(trained(one, TASK, filtered(one))) for one in ("none", "confident"))
    assert plain.keys() == off.keys() and all(torch.equal(plain[name], off[name]) for name in plain)
    assert any(not torch.equal(plain[name], confident[name]) for name in plain)


def test_a_filter_of_everything_leaves_all_parameters_as_they_were(
    trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, dict[str, Tensor]] = {}
    begin, save = StudentRole.begin, StudentRole.save

    def note(when: str, student: nn.Module) -> None:
        seen[when] = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}

    def begins(self: StudentRole, student: nn.Module, made: Any) -> None:
        begin(self, student, made)
        note("start", student)

    def saves(self: StudentRole, student: nn.Module, teacher: nn.Module, made: Any) -> list[Path]:
        note("end", student)
        return save(self, student, teacher, made)

    monkeypatch.setattr(StudentRole, "begin", begins)
    monkeypatch.setattr(StudentRole, "save", saves)
    trained("all", filtered("all"))
    assert seen["start"] and all(torch.equal(seen["start"][name], seen["end"][name]) for name in seen["start"])
    trained("close", filtered("close"))
    assert any(not torch.equal(seen["start"][name], seen["end"][name]) for name in seen["start"])


def test_a_students_blocks_become_as_steep_as_the_teachers(trained: Any) -> None:
    """LONDON alone on a 2-bit student: its loss falls, though features behind a ReLU are alike to begin with."""
    taps = [[f"layer{number}"] * 2 for number in (1, 2, 3)]
    run = trained(
        "london", {"loss": "lipschitz", "taps": taps},
        **{"student.net": "resnet8", "student.train.epochs": 12, "student.train.lr": 0.05},
    )  # fmt: skip
    rows = [json.loads(line) for line in (run / "student" / "metrics.jsonl").read_text().splitlines()]
    course = [row["terms"]["lipschitz"] for row in rows]
    assert course[0] > 0 and course[-1] < 0.7 * course[0]


def test_blocks_of_nets_learn_how_steep_the_teachers_are() -> None:
    """The same for features of any sign: from a random net to the constants of another within a few steps."""
    torch.manual_seed(0)
    student, teacher = ([nn.Linear(6, 8), nn.Linear(8, 5)] for _ in range(2))
    images = torch.randn(32, 6)
    optimizer = torch.optim.Adam([parameter for layer in student for parameter in layer.parameters()], lr=0.02)

    def stages(layers: list[nn.Linear]) -> list[Tensor]:
        first = layers[0](images).tanh()
        return [images, first, layers[1](first)]

    course = []
    for _ in range(60):
        loss = lipschitz_loss(stages(student), stages(teacher))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.append(loss.item())
    assert course[0] > 1e-3 and course[-1] < course[0] / 100
