"""Soft targets behind a gradient filter: where the student has learned enough, its logits get no gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses.checks import check_choice, check_labels, check_logits
from qkd.losses.choices import CRITERIA, Criterion
from qkd.losses.given import given
from qkd.losses.logits import soft_target_loss
from qkd.losses.stable import in_full_precision


@in_full_precision
def filtered_soft_target_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    criterion: Criterion = "confident",
    threshold: float = 0.01,
) -> Tensor:
    r"""Return soft targets whose gradient is filtered: our reading of KDDG, whose formula was not available to us.

    The value is that of :func:`soft_target_loss`. Its gradient with respect to the student's logits is 0 where the
    criterion holds, and unchanged elsewhere. Probabilities of the criteria are at temperature 1.

    Args:
        student_logits: Shape ``[batch, classes]``, floating.
        teacher_logits: Same shape. Treated as a constant.
        labels: True classes, int64, shape ``[batch]``.
        temperature: :math:`\tau > 0`.
        criterion: ``"confident"``: whole images where the student is at least as sure of the true class as the teacher;
            ``"close"``: individual logits whose probabilities differ by less than ``threshold``; ``"none"`` filters
            nothing, ``"all"`` everything.
        threshold: Threshold of ``"close"``, a difference of probabilities, not negative.

    Returns:
        A scalar, shape ``[]``, in nats.

    Raises:
        ValueError: If the shapes do not fit, labels are not valid classes, or an option is out of range.

    References:
        Wang et al., `Embracing the Dark Knowledge: Domain Generalization Using Regularized Knowledge Distillation
        <https://arxiv.org/abs/2107.02629>`_, 2021 (the abstract).

    Example:
        >>> z = torch.tensor([[2.0, 0.0]], requires_grad=True)
        >>> filtered_soft_target_loss(z, torch.zeros(1, 2), torch.tensor([0]), temperature=1.0).backward()
        >>> z.grad.tolist()  # surer than the teacher
        [[0.0, 0.0]]
    """
    check_logits(student_logits, teacher_logits)
    check_labels(student_logits, labels)
    check_choice("criterion", criterion, CRITERIA)
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold must be finite and not negative, got {threshold=}")
    passes = ~_filtered(student_logits.detach(), teacher_logits.detach(), labels, criterion, threshold)
    kept = torch.where(passes, student_logits, student_logits.detach())
    return soft_target_loss(kept, given(teacher_logits), temperature=temperature)


def _filtered(student: Tensor, teacher: Tensor, labels: Tensor, criterion: str, threshold: float) -> Tensor:
    """Return which logits get no gradient, bool, ``[batch, classes]``."""
    if criterion in ("none", "all"):
        return torch.full(student.shape, criterion == "all", dtype=torch.bool, device=student.device)
    ours, theirs = functional.softmax(student, dim=1), functional.softmax(teacher, dim=1)
    if criterion == "close":
        return (ours - theirs).abs() < threshold
    rows = [side.gather(1, labels[:, None]) for side in (ours, theirs)]
    return (rows[0] >= rows[1]).expand_as(student)
