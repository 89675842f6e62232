"""Losses for other domains and of blocks: formulas in plain numpy, what is filtered, and what each refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qkd.losses import (
    adapted_student_loss,
    adapting_teacher_loss,
    cross_entropy_loss,
    discrepancy_weight,
    filtered_soft_target_loss,
    lipschitz_constants,
    lipschitz_loss,
    mean_discrepancy_loss,
    soft_target_loss,
    student_share,
)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([0, 1, 2, 1])
STUDENT, TEACHER = drawn(0, 4, 3), drawn(1, 4, 3)


def test_discrepancy_is_the_biased_estimate_with_five_kernels() -> None:
    s, t = drawn(2, 4, 3).numpy(), drawn(3, 5, 3).numpy() + 1
    rows = np.concatenate([s, t])
    squares = ((rows[:, None] - rows[None]) ** 2).sum(2)
    width = squares.sum() / (9 * 8)
    k = np.mean([np.exp(-squares / (f * width)) for f in (0.25, 0.5, 1, 2, 4)], axis=0)
    expected = k[:4, :4].mean() + k[4:, 4:].mean() - 2 * k[:4, 4:].mean()
    value = mean_discrepancy_loss(torch.from_numpy(s), torch.from_numpy(t))
    assert value.dtype == torch.float64 and value.item() == pytest.approx(expected, abs=1e-12)
    linear = mean_discrepancy_loss(torch.from_numpy(s), torch.from_numpy(t), kernel="linear")
    assert linear.item() == pytest.approx(((s.mean(0) - t.mean(0)) ** 2).sum(), abs=1e-12)
    assert mean_discrepancy_loss(torch.from_numpy(s), torch.from_numpy(s)).item() == pytest.approx(0, abs=1e-12)


def test_discrepancy_of_equal_rows_is_finite() -> None:
    rows = torch.ones(4, 3, requires_grad=True)
    mean_discrepancy_loss(rows, torch.ones(2, 3)).backward()
    assert bool(rows.grad.isfinite().all())


def test_shares_and_weights_of_the_joint_loss() -> None:
    assert [student_share(p) for p in (0, 1)] == pytest.approx([0.1, 0.9], abs=1e-12)
    assert student_share(0.5) == pytest.approx(math.sqrt(0.1 * 0.9), abs=1e-12)
    assert discrepancy_weight(0.3) == pytest.approx(2 / (1 + math.exp(-3)) - 1, abs=1e-12)


def test_joint_losses() -> None:
    b, g, discrepancy = student_share(0.4), discrepancy_weight(0.4), torch.tensor(0.2, dtype=torch.float64)
    task = cross_entropy_loss(TEACHER, LABELS)
    value = adapting_teacher_loss(TEACHER, LABELS, discrepancy, progress=0.4)
    assert value.item() == pytest.approx((1 - b) * (task.item() + g * 0.2), abs=1e-12)
    far_student, far_teacher = drawn(4, 6, 3), drawn(5, 6, 3)
    value = adapted_student_loss(STUDENT, far_student, TEACHER, far_teacher, LABELS, progress=0.4)

    def kl(z: Tensor, v: Tensor) -> float:
        p, q = (torch.softmax(one / 20, 1).numpy() for one in (v, z))
        return float((p * np.log(p / q)).sum(1).mean())

    expected = b * (
        0.3 * 400 * kl(STUDENT, TEACHER) + 0.7 * cross_entropy_loss(STUDENT, LABELS).item()
        + 400 * kl(far_student, far_teacher)
    )  # fmt: skip
    assert value.item() == pytest.approx(expected, abs=1e-9)


def gradient(criterion: str, **options: float) -> Tensor:
    z = STUDENT.clone().requires_grad_()
    filtered_soft_target_loss(z, TEACHER, LABELS, temperature=2.0, criterion=criterion, **options).backward()
    return z.grad


def test_the_filter_changes_the_gradient_and_not_the_value() -> None:
    z = STUDENT.clone().requires_grad_()
    plain = soft_target_loss(z, TEACHER, temperature=2.0)
    plain.backward()
    for criterion in ("confident", "close", "none", "all"):
        value = filtered_soft_target_loss(STUDENT, TEACHER, LABELS, temperature=2.0, criterion=criterion)
        assert value.item() == plain.item()
    assert torch.equal(gradient("none"), z.grad), "off: plain distillation, bit for bit"
    assert not gradient("all").any()
    p, q = (torch.softmax(one, 1) for one in (TEACHER, STUDENT))
    rows = torch.arange(4)
    stopped = q[rows, LABELS] >= p[rows, LABELS]
    assert bool(stopped.any()) and not bool(stopped.all())
    assert torch.equal(gradient("confident"), torch.where(stopped[:, None], 0.0, z.grad))
    near = (p - q).abs() < 0.2
    assert bool(near.any()) and not bool(near.all())
    assert torch.equal(gradient("close", threshold=0.2), torch.where(near, 0.0, z.grad))


def test_constants_are_singular_values_of_the_transmitting_matrix() -> None:
    features = [drawn(6, 5, 2, 3), drawn(7, 5, 4), drawn(8, 5, 6)]
    rows = [one.flatten(1).numpy() for one in features]
    rows = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in rows]
    expected = [np.linalg.svd(a.T @ b, compute_uv=False)[0] for a, b in zip(rows, rows[1:], strict=False)]
    found = lipschitz_constants(features, iterations=300)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    others = [drawn(9, 5, 3), drawn(10, 5, 4), drawn(11, 5, 2)]
    theirs = lipschitz_constants(others, iterations=300).numpy()
    value = lipschitz_loss(others, features, iterations=300)
    assert value.item() == pytest.approx((((theirs - expected) / expected) ** 2).mean(), rel=1e-8)


def test_constants_where_the_rows_sum_to_nothing() -> None:
    entering, leaving = torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert lipschitz_constants([entering, leaving]).item() == pytest.approx(2.0)
    assert lipschitz_loss([3 * leaving, entering], [entering, leaving]).item() == pytest.approx(0.0, abs=1e-10)


def test_label_smoothing_is_that_of_the_cross_entropies() -> None:
    smooth = cross_entropy_loss(STUDENT, LABELS, label_smoothing=0.2).item()
    teaching = adapting_teacher_loss(STUDENT, LABELS, torch.zeros(()).double(), progress=0.5, label_smoothing=0.2)
    assert teaching.item() == pytest.approx(0.7 * smooth)
    parts = (STUDENT, STUDENT, STUDENT, STUDENT, LABELS)  # equal nets: nothing but the labels
    learning = adapted_student_loss(*parts, progress=0.5, source_share=0.25, label_smoothing=0.2)
    assert learning.item() == pytest.approx(0.3 * 0.75 * smooth)


def test_constants_of_zeros_are_finite() -> None:
    zeros = torch.zeros(3, 4, requires_grad=True)
    value = lipschitz_loss([zeros, zeros * 2], [torch.zeros(3, 2), torch.zeros(3, 2)])
    value.backward()
    assert value.item() == 0 and bool(zeros.grad.isfinite().all())


@pytest.mark.parametrize(
    ("compute", "match"),
    [
        (lambda: mean_discrepancy_loss(torch.zeros(2, 3), torch.zeros(2, 4)), "features of the same size"),
        (lambda: mean_discrepancy_loss(STUDENT, TEACHER, kernel="rbf"), "kernel must be one of gaussian, linear"),
        (lambda: student_share(1.1), "progress must be in"),
        (lambda: student_share(0.5, first=0), "shares must be positive"),
        (lambda: discrepancy_weight(-1), "progress must be in"),
        (
            lambda: adapted_student_loss(
                STUDENT, STUDENT, TEACHER, TEACHER, LABELS, progress=0.5, source_share=2
            ),
            "source_share must be in",
        ),
        (lambda: filtered_soft_target_loss(STUDENT, TEACHER, LABELS, temperature=1, criterion="x"), "criterion must"),
        (lambda: filtered_soft_target_loss(STUDENT, TEACHER, LABELS, temperature=1, threshold=-1), "threshold must be"),
        (lambda: lipschitz_constants([STUDENT]), "at least 2"),
        (lambda: lipschitz_constants([STUDENT, TEACHER], iterations=0), "iterations must be at least 1"),
        (lambda: lipschitz_constants([STUDENT, TEACHER], iterations=1.5), "and an integer, got 1.5"),
    ],
)  # fmt: skip
def test_refusals(compute, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        compute()
