"""The three levels of a teacher's knowledge, one loss each: which part of the soft targets helps (Tang et al. 2020).

Universe: label smoothing (an option of the cross-entropy). Domain: how classes relate (:func:`class_relation_loss`).
Instance: how sure the teacher is of each image (:func:`teacher_confidence_loss`). :func:`top_classes_loss` keeps only
the classes that the teacher thinks likely.

The paper's body was not available to us; the definitions here follow descriptions of it. Our own readings are
marked as such.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses.checks import check_choice, check_labels, check_logits, check_temperature, is_count
from qkd.losses.choices import REMAINDERS, Remainder
from qkd.losses.given import given
from qkd.losses.stable import (
    in_full_precision,
    log_others,
    soft_log_probabilities,
    target_difference,
    undoubled,
    unit_rows,
)


@in_full_precision
def teacher_confidence_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float, scale: float | None = None
) -> Tensor:
    r"""Return the loss with soft targets that carry only the teacher's confidence in the true class (KD-pt).

    .. math:: L = \frac{c}{B} \sum_b \mathrm{KL}(\rho \| \tilde q),\quad \rho_y = \tilde p_y,\quad
              \rho_{k \ne y} = \frac{1 - \tilde p_y}{K - 1}

    with :math:`\tilde p, \tilde q` the softmax of teacher's and student's logits over :math:`\tau`.

    Args:
        student_logits: Shape ``[batch, classes]``, floating, at least two classes.
        teacher_logits: Same shape. Treated as a constant.
        labels: Shape ``[batch]``, int64.
        temperature: :math:`\tau > 0`.
        scale: :math:`c \ge 0`; defaults to :math:`\tau^2`.

    Returns:
        A scalar, shape ``[]``, in nats: the cross-entropy :math:`H(\rho, \tilde q)` minus the entropy of
        :math:`\rho`, a constant of the student; the gradient is the same.

    Raises:
        ValueError: If shapes do not fit, there are fewer than two classes, or a number is out of range.

    References:
        Tang et al., `Understanding and Improving Knowledge Distillation <https://arxiv.org/abs/2002.03532>`_, 2020;
        the form of :math:`\rho` is our reading: it follows from what the loss isolates.
    """
    check_logits(student_logits, teacher_logits, least_classes=2)
    check_labels(student_logits, labels)
    check_temperature(temperature, scale)
    teacher_log = soft_log_probabilities(given(teacher_logits), temperature)
    is_target = functional.one_hot(labels, teacher_log.shape[1]).bool()
    others = log_others(teacher_log, is_target) - math.log(teacher_log.shape[1] - 1)
    target_log = torch.where(is_target, teacher_log, others.unsqueeze(1))
    return _divergence(student_logits, target_log, temperature, scale)


@in_full_precision
def class_relation_loss(
    student_logits: Tensor,
    labels: Tensor,
    class_weights: Tensor,
    *,
    temperature: float,
    sharpness: float = 0.3,
    one_hot_share: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    r"""Return the loss with soft targets that carry only the true class's relations to the others (KD-sim).

    .. math:: L = \frac{c}{B} \sum_b \mathrm{KL}(\rho(y_b) \| \tilde q_b),\quad
              \rho(y) = m\, \mathrm{onehot}(y) + (1 - m)\, \sigma(\hat W \hat w_y / s)

    with :math:`\hat W` the rows of the teacher's last layer, each of norm 1.

    Args:
        student_logits: Shape ``[batch, classes]``, floating.
        labels: Shape ``[batch]``, int64.
        class_weights: The teacher's last layer, shape ``[classes, features]``. Treated as a constant.
        temperature: :math:`\tau > 0` of the student's distribution.
        sharpness: :math:`s > 0`; cosines are in [-1, 1], so 1 gives nearly flat targets.
        one_hot_share: :math:`m` in ``[0, 1)``.
        scale: :math:`c \ge 0`; defaults to :math:`\tau^2`.

    Returns:
        A scalar, shape ``[]``, in nats: the cross-entropy minus the entropy of :math:`\rho`.

    Raises:
        ValueError: If shapes do not fit, or a number is out of range.

    References:
        Tang et al. 2020; that the relation is a softmax of cosines is our reading, ``sharpness`` and
        ``one_hot_share`` are ours.
    """
    check_labels(student_logits, labels)
    check_temperature(temperature, scale)
    targets = _relation_logs(class_weights, sharpness, one_hot_share)
    if student_logits.dim() != 2 or len(targets) != student_logits.shape[1]:
        raise ValueError(f"need logits [batch, {len(targets)}] for these class weights, got {student_logits.shape}")
    return _divergence(student_logits, targets[labels].to(student_logits.dtype), temperature, scale)


@in_full_precision
def class_relation_targets(class_weights: Tensor, *, sharpness: float = 0.3, one_hot_share: float = 0.0) -> Tensor:
    """Return the targets of :func:`class_relation_loss` for each class.

    Args:
        class_weights: Weights of the teacher's last layer, shape ``[classes, features]``, floating.
        sharpness: As for :func:`class_relation_loss`.
        one_hot_share: As for :func:`class_relation_loss`.

    Returns:
        Probabilities, shape ``[classes, classes]``; each row sums to one.

    Raises:
        ValueError: If the weights are not two-dimensional, or a number is out of range.
    """
    return _relation_logs(class_weights, sharpness, one_hot_share).exp()


def _relation_logs(class_weights: Tensor, sharpness: float, one_hot_share: float) -> Tensor:
    """Return the logarithms of the targets: a small sharpness gives probabilities that underflow."""
    if class_weights.dim() != 2:
        raise ValueError(f"need class weights [classes, features], got {tuple(class_weights.shape)}")
    if not (math.isfinite(sharpness) and sharpness > 0):
        raise ValueError(f"sharpness must be positive and finite, got {sharpness}")
    if not 0 <= one_hot_share < 1:
        raise ValueError(f"one_hot_share must be in [0, 1), got {one_hot_share}")
    rows = unit_rows(given(class_weights))
    logs = functional.log_softmax(rows @ rows.T / sharpness, dim=1)
    if not one_hot_share:
        return logs
    logs = logs + math.log1p(-one_hot_share)
    own = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return torch.where(own, torch.logaddexp(logs, torch.full_like(logs, math.log(one_hot_share))), logs)


@in_full_precision
def top_classes_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    classes: int,
    remainder: Remainder = "uniform",
    scale: float | None = None,
) -> Tensor:
    r"""Return the loss with soft targets of the classes that the teacher thinks likeliest (KD-topk).

    .. math:: L = \frac{c}{B} \sum_b \mathrm{KL}(\rho \| \tilde q),\quad
              \rho_i = \tilde p_i\ (i \in \mathrm{top}_k),\quad
              \rho_i = \frac{1 - \sum_{\mathrm{top}} \tilde p}{K - k}\ \text{else}

    Args:
        student_logits: Shape ``[batch, classes]``, floating.
        teacher_logits: Same shape. Treated as a constant.
        temperature: :math:`\tau > 0`.
        classes: :math:`k`, from 1 to all; a quarter of them was best on CIFAR-100 in the descriptions. Ties go
            to the first class.
        remainder: ``uniform`` as above (our reading); ``renormalize`` gives the rest to the top classes in proportion.
        scale: :math:`c \ge 0`; defaults to :math:`\tau^2`.

    Returns:
        A scalar, shape ``[]``, in nats: the cross-entropy minus the entropy of :math:`\rho`. With all classes it is
        :func:`soft_target_loss`, bit for bit.

    Raises:
        ValueError: If shapes do not fit, or a number is out of range.

    References:
        Tang et al. 2020.
    """
    check_logits(student_logits, teacher_logits)
    check_temperature(temperature, scale)
    check_choice("remainder", remainder, REMAINDERS)
    count = student_logits.shape[1]
    if not is_count(classes) or classes > count:
        raise ValueError(f"classes must be 1 to {count} (all of them), an integer, got {classes!r}")
    teacher_log = soft_log_probabilities(given(teacher_logits), temperature)
    if classes == count:
        return _divergence(student_logits, teacher_log, temperature, scale)
    kept = _largest(teacher_log, classes)
    if remainder == "renormalize":
        inside = teacher_log.masked_fill(~kept, -math.inf).logsumexp(1, keepdim=True)
        target_log = torch.where(kept, teacher_log - inside, torch.full_like(teacher_log, _least_log(teacher_log)))
    else:
        rest = teacher_log.masked_fill(kept, -math.inf).logsumexp(1, keepdim=True) - math.log(count - classes)
        target_log = torch.where(kept, teacher_log, rest.expand_as(teacher_log))
    return _divergence(student_logits, target_log, temperature, scale)


@in_full_precision
def gradient_rescaling(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    teacher_share: float,
    temperature: float,
    scale: float | None = None,
) -> Tensor:
    r"""Return the factor by which soft targets change the size of each image's gradient (the instance level).

    .. math:: w = (1 - \lambda) + \lambda \frac{c}{\tau} \frac{\tilde p_y - \tilde q_y}{1 - q_y}

    It is the sum, over the wrong classes, of the gradients of :math:`(1-\lambda) H(y, q) + \lambda c H(\tilde p,
    \tilde q)` by the logits, over that of the first term alone with :math:`\lambda = 0`.

    Args:
        student_logits: Shape ``[batch, classes]``.
        teacher_logits: Same shape.
        labels: Shape ``[batch]``, int64.
        teacher_share: :math:`\lambda` in ``[0, 1]``.
        temperature: :math:`\tau > 0`.
        scale: :math:`c`; defaults to :math:`\tau^2`.

    Returns:
        Shape ``[batch]``, without gradient. Below :math:`1 - \lambda` where the student is surer than the teacher.

    Raises:
        ValueError: If shapes do not fit, there are fewer than two classes, or a number is out of range.

    References:
        Tang et al. 2020, the instance level; the identity is derived, and tested against autograd.
    """
    check_logits(student_logits, teacher_logits, least_classes=2)
    check_labels(student_logits, labels)
    check_temperature(temperature, scale)
    if not 0 <= teacher_share <= 1:
        raise ValueError(f"teacher_share must be in [0, 1], got {teacher_share}")
    student, teacher = student_logits.detach(), teacher_logits.detach()
    is_target = functional.one_hot(labels, student.shape[1]).bool()
    wrong = log_others(functional.log_softmax(student, dim=1), is_target).exp()
    tiny = torch.finfo(student.dtype).tiny
    teacher_log, student_log = (soft_log_probabilities(logits, temperature) for logits in (teacher, student))
    factor = temperature if scale is None else scale / temperature
    surer = target_difference(teacher_log, student_log, is_target)
    return undoubled((1 - teacher_share) + teacher_share * factor * surer / wrong.clamp_min(tiny), student, temperature)


@in_full_precision
def equivalent_label_smoothing(teacher_logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Return the label smoothing that is as unsure of the true class as the teacher is on average.

    .. math:: \epsilon = \frac{K (1 - \bar p_y)}{K - 1}

    Args:
        teacher_logits: Shape ``[batch, classes]``, at least two classes.
        labels: Shape ``[batch]``, int64.
        temperature: :math:`\tau > 0`.

    Returns:
        A scalar, shape ``[]``, in ``[0, K / (K - 1)]``.

    Raises:
        ValueError: If shapes do not fit, or the temperature is out of range.
    """
    check_logits(teacher_logits, teacher_logits, least_classes=2)
    check_labels(teacher_logits, labels)
    check_temperature(temperature)
    classes = teacher_logits.shape[1]
    sure = functional.softmax(given(teacher_logits) / temperature, dim=1)
    mean = sure.gather(1, labels.unsqueeze(1)).mean()
    return classes * (1 - mean) / (classes - 1)


def _divergence(student_logits: Tensor, target_log: Tensor, temperature: float, scale: float | None) -> Tensor:
    student_log = soft_log_probabilities(student_logits, temperature)
    divergence = functional.kl_div(student_log, target_log, reduction="sum", log_target=True)
    return undoubled(
        divergence / len(student_logits) * (temperature**2 if scale is None else scale), student_logits, temperature
    )


def _largest(rows: Tensor, count: int) -> Tensor:
    """Return a mask of the largest entries of each row. Ties go to the first, which ``topk`` does not guarantee."""
    last = rows.topk(count, dim=1).values[:, -1:]
    above = ~(rows <= last)  # NaNs stay, for the training loop to find
    ties = rows == last
    return above | (ties & (ties.cumsum(1) <= count - above.sum(1, keepdim=True)))


def _least_log(like: Tensor) -> float:
    """Return the logarithm of the smallest positive number of a type: stands for probability zero, but is finite."""
    return math.log(torch.finfo(like.dtype).tiny)
