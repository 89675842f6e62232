"""Losses on branches: worked numbers, identities, gradients, extremes, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from qkd.losses import branch_soft_target_loss, joint_label_loss, soft_target_loss


def test_joint_labels_by_hand() -> None:
    # One image of class 1 of 2: rows want the columns 4, 5, 6, 7 of 8. Row r has log(9) at its own column, 0 elsewhere:
    # probability 9 / (9 + 7) each, so -log(9/16) a branch; a second branch of zeros gives log 8.
    sure = math.log(9) * torch.eye(8, dtype=torch.float64)[4:]
    loss = joint_label_loss([sure, torch.zeros(4, 8, dtype=torch.float64)], torch.tensor([1]))
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert abs(loss.item() - (math.log(16 / 9) + math.log(8))) < 1e-12


def test_mixed_images_have_a_share_of_each_joint_label() -> None:
    generator = torch.Generator().manual_seed(2)
    branch = torch.randn(8, 12, dtype=torch.float64, generator=generator)
    labels, others, share = torch.tensor([2, 0]), torch.tensor([1, 0]), torch.tensor([0.25, 0.5], dtype=torch.float64)
    rows = -torch.log_softmax(branch, 1)
    by_hand = [
        (1 - share[row // 4]) * rows[row, 4 * labels[row // 4] + row % 4]
        + share[row // 4] * rows[row, 4 * others[row // 4] + row % 4]
        for row in range(8)
    ]
    loss = joint_label_loss([branch], labels, others, share)
    assert abs(float(loss - torch.stack(by_hand).mean())) < 1e-12
    with pytest.raises(ValueError, match="belong together"):
        joint_label_loss([branch], labels, others)


def test_branch_soft_targets_by_hand() -> None:
    # Temperature 2, teacher (2 log 3, 0) -> (3/4, 1/4), student (0, 0) -> (1/2, 1/2):
    # KL = 3/4 log(3/2) + 1/4 log(1/2); times 4; twice, because there are two branches.
    teacher = torch.tensor([[2 * math.log(3), 0.0]], dtype=torch.float64)
    student = torch.zeros(1, 2, dtype=torch.float64)
    loss = branch_soft_target_loss([student, student], [teacher, teacher], temperature=2.0)
    assert abs(loss.item() - 2 * 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))) < 1e-12


def test_equal_branches_have_nothing_to_learn_and_one_branch_is_the_soft_target_loss() -> None:
    a, b = torch.randn(8, 12), torch.randn(8, 12)
    assert branch_soft_target_loss([a, b], [a, b], temperature=3.0).item() == 0
    assert torch.equal(branch_soft_target_loss([a], [b], temperature=3.0), soft_target_loss(a, b, temperature=3.0))


def test_the_teachers_branches_get_no_gradient() -> None:
    student, teacher = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    branch_soft_target_loss([student], [teacher], temperature=3.0).backward()
    assert teacher.grad is None and student.grad is not None and bool(student.grad.any())


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(4, 8, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(3))
    labels = torch.tensor([1])
    assert torch.autograd.gradcheck(lambda x, y: joint_label_loss([x, y], labels, label_smoothing=0.1), (a, b))
    fixed = c.detach()
    assert torch.autograd.gradcheck(lambda x, y: branch_soft_target_loss([x, y], [fixed, y], temperature=3.0), (a, b))


EXTREMES = {
    "zeros": torch.zeros(8, 12),
    "constant": torch.full((8, 12), 3.0),
    "huge": 1e4 * torch.randn(8, 12, generator=torch.Generator().manual_seed(1)),
    "one-hot": torch.eye(12)[:8],
    "huge one-hot": 1e4 * torch.eye(12)[:8],
}


@pytest.mark.parametrize("student", EXTREMES.values(), ids=EXTREMES.keys())
@pytest.mark.parametrize("teacher", EXTREMES.values(), ids=EXTREMES.keys())
def test_extreme_logits_stay_finite(student: torch.Tensor, teacher: torch.Tensor) -> None:
    student = student.clone().requires_grad_()
    loss = branch_soft_target_loss([student], [teacher], temperature=3.0)
    loss = loss + joint_label_loss([student], torch.tensor([2, 0]))
    loss.backward()
    assert bool(loss.isfinite()) and student.grad is not None and bool(student.grad.isfinite().all())


ROWS = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: joint_label_loss([], torch.tensor([1])), "at least one branch"),
        (lambda: joint_label_loss([ROWS], torch.tensor([1, 0])), r"4 rows per image .*\(4, 8\) for 2 labels"),
        (
            lambda: joint_label_loss([torch.zeros(4, 18)], torch.tensor([0])),
            r"4 columns per class, got shape \(4, 18\)",
        ),
        (lambda: joint_label_loss([ROWS], torch.tensor([2])), "labels must be 0 to 1 for 2 classes, got 2 to 2"),
        (lambda: joint_label_loss([ROWS], torch.tensor([1]), label_smoothing=1.0), "label_smoothing"),
        (lambda: joint_label_loss([ROWS], torch.tensor(1)), r"need labels \[batch\]"),
        (lambda: branch_soft_target_loss([], [], temperature=3.0), "at least one branch"),
        (
            lambda: branch_soft_target_loss([ROWS], [ROWS, ROWS], temperature=3.0),
            "the same number of branches, got 1 and 2",
        ),
        (lambda: branch_soft_target_loss([ROWS], [ROWS[:2]], temperature=3.0), "the same shape"),
        (lambda: branch_soft_target_loss([ROWS], [ROWS], temperature=0.0), "temperature must be positive"),
    ],
)
def test_refusals(call: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()  # type: ignore[operator]
