"""Losses on the logits of auxiliary branches: joint labels of class and orientation, and soft targets branch by branch.

See also :func:`~qkd.losses.logits.soft_target_loss`, the divergence that is summed here.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qkd.losses.checks import check_labels
from qkd.losses.logits import cross_entropy_loss, soft_target_loss
from qkd.losses.stable import in_full_precision
from qkd.losses.turns import TURNS, joint_labels, upright


@in_full_precision
def joint_label_loss(
    branch_logits: Sequence[Tensor],
    labels: Tensor,
    other_labels: Tensor | None = None,
    other_share: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Return the cross-entropy of branches with the joint labels of turned images, summed over the branches.

    .. math:: L = \sum_l \frac{1}{4B} \sum_{b, r} -\log \sigma(a^l_{4b + r})_{4 y_b + r}

    Args:
        branch_logits: :math:`a^l`, one tensor per branch, shape ``[4 * batch, 4 * classes]``, floating; rows in the
            order of :func:`~qkd.losses.turns.turn_images`.
        labels: True classes :math:`y`, shape ``[batch]``, int64.
        other_labels: Second classes of mixed images (CutMix), shape ``[batch]``, int64; None if there are none.
        other_share: Their share of each label, shape ``[batch]``, in ``[0, 1]``. Required with ``other_labels`` and
            only then.
        label_smoothing: In ``[0, 1)``, the share of a joint label spread over all ``4 * classes``.

    Returns:
        A scalar, shape ``[]``, in nats.

    Raises:
        ValueError: If there are no branches, shapes do not fit, only one of the two ``other`` tensors is given, or
            ``label_smoothing`` is out of range.

    References:
        Yang et al., `Hierarchical Self-supervised Augmented Knowledge Distillation
        <https://arxiv.org/abs/2107.13715>`_, 2021.

    Example:
        >>> import torch
        >>> round(joint_label_loss([torch.zeros(4, 8), torch.zeros(4, 8)], torch.tensor([1])).item(), 4)
        4.1589
    """
    _require_branches(branch_logits)
    targets = joint_labels(labels)
    for logits in branch_logits:
        if logits.dim() != 2 or logits.shape[1] % TURNS or len(logits) != len(targets):
            raise ValueError(
                f"joint logits need {TURNS} rows per image and {TURNS} columns per class, got shape "
                f"{tuple(logits.shape)} for {len(labels)} labels"
            )
        check_labels(upright(logits)[:, ::TURNS], labels)
    others = None if other_labels is None else joint_labels(other_labels)
    shares = None if other_share is None else other_share.repeat_interleave(TURNS)
    losses = [
        cross_entropy_loss(logits, targets, others, shares, label_smoothing=label_smoothing) for logits in branch_logits
    ]
    return sum(losses[1:], losses[0])


@in_full_precision
def branch_soft_target_loss(
    student_branches: Sequence[Tensor], teacher_branches: Sequence[Tensor], *, temperature: float
) -> Tensor:
    r"""Return the soft-target loss of every branch, each averaged over its rows, summed over the branches.

    .. math:: L = \sum_l \tau^2\, \mathrm{KL}(\sigma(a_t^l / \tau) \,\|\, \sigma(a_s^l / \tau))

    Args:
        student_branches: :math:`a_s^l`, one tensor per branch, shape ``[rows, outputs]``, floating.
        teacher_branches: :math:`a_t^l`, the same number of tensors, of the same shapes. Treated as constants.
        temperature: :math:`\tau > 0`.

    Returns:
        A scalar, shape ``[]``, in nats. Zero where both are equal.

    Raises:
        ValueError: If there are no branches, their numbers or shapes differ, or ``temperature`` is not positive.

    References:
        Yang et al., `Hierarchical Self-supervised Augmented Knowledge Distillation
        <https://arxiv.org/abs/2107.13715>`_, 2021.

    Example:
        >>> import torch
        >>> branches = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
        >>> branch_soft_target_loss(branches, branches, temperature=3.0).item()
        0.0
    """
    _require_branches(student_branches)
    if len(student_branches) != len(teacher_branches):
        raise ValueError(
            f"student and teacher need the same number of branches, "
            f"got {len(student_branches)} and {len(teacher_branches)}"
        )
    losses = [
        soft_target_loss(student, teacher, temperature=temperature)
        for student, teacher in zip(student_branches, teacher_branches, strict=True)
    ]
    return sum(losses[1:], losses[0])


def _require_branches(branch_logits: Sequence[Tensor]) -> None:
    if not branch_logits:
        raise ValueError("needs the logits of at least one branch, got none")
