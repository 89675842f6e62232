"""SPEQ: its loss by hand, its step beside the one without it, and no trace in statistics or gradients of the copy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qkd.config import SelfDistillationConfig
from qkd.config.training import TermConfig
from qkd.methods.stochastic_precision.step import TERM, SelfStep, soft_cosine_loss
from qkd.seeding import global_stream, stream
from qkd.terms.step import DistillStep
from qkd.terms.weighting import build_terms
from qkd.testing import TinyNet, synthetic_splits
from qkd.training import Batch
from quantizers import QuantSpec, Student, calibrate, prepare
from quantizers.recipes.precision import stochastic_precision

pytestmark = pytest.mark.usefixtures("eager")


def test_the_loss_by_hand() -> None:
    student, teacher = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])  # (3/4, 1/4) and (1/2, 1/2)
    cosine = (0.375 + 0.125) / (math.sqrt(0.625) * math.sqrt(0.5))
    assert soft_cosine_loss(student, teacher, temperature=1.0).item() == pytest.approx(1 - cosine, abs=1e-7)
    assert soft_cosine_loss(2 * student, teacher, temperature=2.0).item() == pytest.approx(4 * (1 - cosine), abs=1e-6)
    assert soft_cosine_loss(student, student, temperature=3.0).item() == 0.0


def test_no_gradient_reaches_the_teacher_and_faults_are_refused() -> None:
    student, teacher = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    soft_cosine_loss(student, teacher, temperature=2.0).backward()
    assert teacher.grad is None and student.grad is not None
    fixed = teacher.detach()
    assert torch.autograd.gradcheck(lambda z: soft_cosine_loss(z, fixed, temperature=2.0), (student,))
    with pytest.raises(ValueError, match="temperature"):
        soft_cosine_loss(student, teacher, temperature=0.0)
    with pytest.raises(ValueError, match="shape"):
        soft_cosine_loss(student, teacher[:2], temperature=1.0)


def nets() -> tuple[Student, TinyNet, Batch]:
    splits = synthetic_splits()
    raw, labels = splits.train.batch(torch.arange(8), "cpu")
    images = raw.float() / 128 - 1
    with global_stream(0, "net"):
        net = TinyNet()
    student = prepare(net, QuantSpec(2, 2), images)
    calibrate(student, images)
    teacher = TinyNet().eval().requires_grad_(False)  # noqa: FBT003
    return student.train(), teacher, Batch(images, labels, raw, epoch=1, step=3)


def steps(student: Student, teacher: TinyNet, **options: Any) -> tuple[DistillStep, SelfStep]:
    terms = build_terms([TermConfig(loss="cross_entropy")], label_smoothing=0.0)
    base = DistillStep(student, teacher, terms)
    return base, SelfStep(base, student, SelfDistillationConfig(**options), seed=5)


def statistics(student: Student) -> list[Tensor]:
    return [buffer.clone() for name, buffer in student.named_buffers() if "running" in name or "tracked" in name]


def test_the_step_adds_its_term_and_leaves_statistics_as_the_base_does() -> None:
    student, teacher, batch = nets()
    base, own = steps(student, teacher, weight=3.0, temperature=2.0)
    start = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    expected, after_base = base(batch), statistics(student)
    student.load_state_dict(start)
    found = own(batch)
    assert all(torch.equal(a, b) for a, b in zip(statistics(student), after_base, strict=True))
    with stochastic_precision(student, stream(5, "self distillation", 1, 3)), torch.no_grad():
        copy = student(batch.images)
    term = soft_cosine_loss(expected.logits, copy, temperature=2.0)
    assert torch.equal(found.terms[TERM], term) and float(term.detach()) > 0
    assert torch.equal(found.loss, expected.loss + 3.0 * term)
    assert torch.equal(found.logits, expected.logits)


def test_a_copy_that_keeps_its_bits_teaches_nothing() -> None:
    student, teacher, batch = nets()
    base, own = steps(student, teacher)
    own._options = own._options.model_copy(update={"low_share": 1.0})
    assert float(own(batch).terms[TERM].detach()) == 0.0
    assert torch.equal(own(batch).loss, base(batch).loss)
