"""Joint distillation and domain adaptation: a teacher that adapts, and a student that follows it on both domains."""

from __future__ import annotations

import math

from torch import Tensor

from qkd.losses.checks import check_scalar
from qkd.losses.logits import cross_entropy_loss, soft_target_loss
from qkd.losses.stable import in_full_precision

FIRST_SHARE, LAST_SHARE = 0.1, 0.9


def student_share(progress: float, *, first: float = FIRST_SHARE, last: float = LAST_SHARE) -> float:
    r"""Return the student's share of the joint loss: it grows exponentially during training.

    .. math:: b = b_0 (b_1 / b_0)^p

    Args:
        progress: :math:`p`, the fraction of training done, in ``[0, 1]``.
        first: :math:`b_0`, positive.
        last: :math:`b_1`, positive.

    Returns:
        :math:`b`.

    Raises:
        ValueError: If ``progress`` is out of range, or a share is not positive.

    Example:
        >>> round(student_share(0.5), 6)
        0.3
    """
    _check_progress(progress)
    if not (first > 0 and last > 0):
        raise ValueError(f"shares must be positive, got {first=} and {last=}")
    return first * math.exp(progress * math.log(last / first))


def discrepancy_weight(progress: float) -> float:
    r"""Return the weight of the discrepancy: :math:`g = 2 / (1 + e^{-10 p}) - 1`, from 0 to 1.

    Args:
        progress: :math:`p`, the fraction of training done, in ``[0, 1]``.

    Returns:
        :math:`g`.

    Raises:
        ValueError: If ``progress`` is out of range.

    Example:
        >>> discrepancy_weight(0.0)
        0.0
    """
    _check_progress(progress)
    return 2 / (1 + math.exp(-10 * progress)) - 1


@in_full_precision
def adapting_teacher_loss(
    source_logits: Tensor, labels: Tensor, discrepancy: Tensor, *, progress: float, label_smoothing: float = 0.0
) -> Tensor:
    r"""Return the teacher's part of the joint loss: source labels, and features that do not distinguish domains.

    .. math:: L = (1 - b)(\mathrm{CE} + g\, \mathrm{MMD})

    Args:
        source_logits: Logits of the teacher on source images, shape ``[batch, classes]``.
        labels: Labels of the source images, int64, shape ``[batch]``.
        discrepancy: :func:`mean_discrepancy_loss` of its features on both domains, shape ``[]``.
        progress: The fraction of training done, in ``[0, 1]``; gives :math:`b` and :math:`g`.
        label_smoothing: Share of a label that is spread over all classes, in ``[0, 1)``; 0 in the paper.

    Returns:
        A scalar, shape ``[]``.

    Raises:
        ValueError: If the shapes do not fit, labels are not valid classes, or a number is out of range.

    References:
        arXiv 2005.07839, 2020. Not copied from the released code: there the student's loss updates the teacher, too.
    """
    check_scalar(discrepancy=discrepancy)
    share, weight = student_share(progress), discrepancy_weight(progress)
    task = cross_entropy_loss(source_logits, labels, label_smoothing=label_smoothing)
    return (1 - share) * (task + weight * discrepancy)


@in_full_precision
def adapted_student_loss(
    student_source: Tensor,
    student_target: Tensor,
    teacher_source: Tensor,
    teacher_target: Tensor,
    labels: Tensor,
    *,
    progress: float,
    temperature: float = 20.0,
    source_share: float = 0.3,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Return the student's part of the joint loss: source labels, and soft targets on both domains.

    .. math:: L = b\, \big( a \tau^2 \mathrm{KL}_s + (1 - a)\, \mathrm{CE}_s + \tau^2 \mathrm{KL}_t \big),\quad
              \mathrm{KL} = \mathrm{KL}(\sigma(z_T / \tau) \| \sigma(z_S / \tau))

    Args:
        student_source: Logits of source images, shape ``[batch, classes]``.
        student_target: Logits of target images, shape ``[other, classes]``.
        teacher_source: The teacher's of source images, shape ``[batch, classes]``. Constants.
        teacher_target: The teacher's of target images, shape ``[other, classes]``. Constants.
        labels: Labels of the source images, int64, shape ``[batch]``; those of the target are unknown.
        progress: The fraction of training done, in ``[0, 1]``; gives :math:`b`.
        temperature: :math:`\tau > 0`.
        source_share: :math:`a` in ``[0, 1]``.
        label_smoothing: Share of a label that is spread over all classes, in ``[0, 1)``; 0 in the paper.

    Returns:
        A scalar, shape ``[]``.

    Raises:
        ValueError: If the shapes do not fit, labels are not valid classes, or a number is out of range.

    References:
        arXiv 2005.07839, 2020. Not copied from the released code: the teacher is a constant here, and the divergence is
        from the teacher to the student.
    """
    if not 0 <= source_share <= 1:
        raise ValueError(f"source_share must be in [0, 1], got {source_share=}")
    if student_source.shape[1:] != student_target.shape[1:]:
        raise ValueError(
            f"source and target need logits of the same classes, got {tuple(student_source.shape)} and "
            f"{tuple(student_target.shape)}"
        )
    near = soft_target_loss(student_source, teacher_source, temperature=temperature)
    far = soft_target_loss(student_target, teacher_target, temperature=temperature)
    task = cross_entropy_loss(student_source, labels, label_smoothing=label_smoothing)
    return student_share(progress) * (source_share * near + (1 - source_share) * task + far)


def _check_progress(progress: float) -> None:
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress=}")
