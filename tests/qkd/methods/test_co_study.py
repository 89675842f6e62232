"""Co-studying: each net learns from its own terms, neither from the other's, and features go both ways."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from qkd.config import TermConfig
from qkd.methods.co_study.step import CoStudyStep
from qkd.methods.ensemble.average import EnsembleTeacher
from qkd.terms import build_terms
from qkd.terms.step import DistillStep
from qkd.training import Batch, supervised_step
from qkd.training.supervised import LogitsGuard

IMAGES = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
BATCH = Batch(IMAGES, torch.tensor([0, 1, 2, 0, 1, 2]), IMAGES.byte(), 0, 0)
BOTH = [TermConfig(loss="cross_entropy"), TermConfig(loss="soft_target", options={"temperature": 2.0})]


def net(seed: int, width: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def gradients(of: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in of.parameters() if parameter.grad is not None]


def test_the_student_gets_what_it_would_get_from_a_fixed_teacher() -> None:
    student, teacher = net(0), net(1, 7)
    alone = DistillStep(student, teacher, build_terms(BOTH))(BATCH)
    alone.loss.backward()
    expected = gradients(student)
    student.zero_grad()
    together = CoStudyStep(student, teacher, build_terms(BOTH), build_terms(BOTH))(BATCH)
    together.loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(student), expected, strict=True))
    assert len(gradients(teacher)) == 4


def test_the_teacher_learns_from_the_student_and_moves_it_not() -> None:
    student, teacher = net(0), net(1, 7)
    only_teacher = [TermConfig(loss="soft_target", options={"temperature": 2.0})]
    step = CoStudyStep(student, teacher, build_terms([TermConfig(loss="cross_entropy")]), build_terms(only_teacher))
    result = step(BATCH)
    expected = 4 * nn.functional.kl_div(
        torch.log_softmax(teacher(IMAGES) / 2, 1), torch.log_softmax(student(IMAGES) / 2, 1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    assert torch.allclose(result.terms["teacher_soft_target"], expected)
    result.terms["teacher_soft_target"].backward()
    assert gradients(student) == []
    assert gradients(teacher)


def test_equal_nets_have_nothing_to_tell_each_other() -> None:
    result = CoStudyStep(net(0), net(0), build_terms(BOTH), build_terms(BOTH))(BATCH)
    assert result.terms["soft_target"] == result.terms["teacher_soft_target"] == 0


def test_features_go_both_ways() -> None:
    student, teacher = net(0), net(1, 7)
    to_student = build_terms([TermConfig(loss="similarity_preserving", taps=(("0", "1"),))])
    to_teacher = build_terms([TermConfig(loss="similarity_preserving", taps=(("1", "0"),))])
    step = CoStudyStep(student, teacher, to_student, to_teacher)
    with step.tapped():
        result = step(BATCH)
    assert all(math.isfinite(value.item()) and value > 0 for value in result.terms.values())
    assert set(result.terms) == {"similarity_preserving", "teacher_similarity_preserving"}


def test_a_decay_counts_from_the_phase() -> None:
    terms = build_terms([TermConfig(loss="cross_entropy", weight=8.0, decay=0.5)])
    step = DistillStep(net(0), net(1), terms, first_epoch=3)
    values = [step(Batch(BATCH.images, BATCH.labels, BATCH.raw, epoch, 0)).loss.item() for epoch in (3, 4, 6)]
    assert values == pytest.approx([values[0], values[0] / 2, values[0] / 8])


def test_terms_that_read_a_last_layer_are_refused_for_the_teacher() -> None:
    terms = build_terms([TermConfig(loss="class_relation")])
    with pytest.raises(ValueError, match="teacher_terms: class_relation"):
        CoStudyStep(net(0), net(1), build_terms(BOTH), terms)


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.LogSoftmax(1)])
@pytest.mark.parametrize("kind", ["distill", "co-study"])
def test_a_teacher_that_gives_probabilities_is_refused(end: nn.Module, kind: str) -> None:
    """Losses soften logits themselves: a softmax of a softmax would be a soft target that says little."""
    student, teacher = net(0), nn.Sequential(net(1, 7), end)
    step = (
        DistillStep(student, teacher, build_terms(BOTH))
        if kind == "distill"
        else CoStudyStep(student, teacher, build_terms(BOTH), build_terms(BOTH))
    )
    word = "log_softmax" if isinstance(end, nn.LogSoftmax) else "softmax"
    with pytest.raises(
        ValueError, match=rf"the teacher returns .*probabilities: it ends in {word}, .*remove that layer"
    ):
        step(BATCH)


def test_every_net_that_gives_probabilities_is_refused() -> None:
    """Members of an ensemble, nets that learn beside the student, and nets that learn from labels alone."""
    soft = nn.Sequential(net(1, 7), nn.Softmax(1))
    with pytest.raises(ValueError, match="the teacher's member 2 returns probabilities"):
        EnsembleTeacher([net(0), soft])(BATCH.images)
    with pytest.raises(ValueError, match="the net returns probabilities"):
        supervised_step(soft)(BATCH)
    with pytest.raises(ValueError, match="the student returns probabilities"):
        CoStudyStep(soft, net(0), build_terms(BOTH), build_terms(BOTH))(BATCH)
    teacher = net(2)
    teacher.requires_grad_(False).eval()
    DistillStep(soft, teacher, build_terms(BOTH), student_learns=False)(BATCH)  # modules learn: it is in eval mode
    with pytest.raises(TypeError, match=r"the net returns a tuple in train\(\), but a training on the labels"):
        supervised_step(Pair())(BATCH)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = net(0)

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(x), x


def test_the_guard_of_logits_lets_logits_through() -> None:
    guard = LogitsGuard()
    guard(torch.tensor([[0.5, 0.5], [2.0, -1.0]]))  # one row that sums to one is no softmax
    LogitsGuard()(torch.zeros(3, 4))
    LogitsGuard()(torch.ones(3, 1))
    with pytest.raises(ValueError, match="the teacher returns probabilities"):
        LogitsGuard()(torch.softmax(torch.randn(5, 1000).half().float() * 4, 1))
    guard(torch.softmax(torch.randn(5, 3), 1))  # only the first batch is looked at
