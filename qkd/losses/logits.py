"""Losses on logits: labels, soft targets, and soft targets in two parts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses.checks import check_labels, check_logits, check_share, check_temperature, check_weight
from qkd.losses.given import given
from qkd.losses.stable import in_full_precision, log_others, soft_log_probabilities, undoubled

Reduction = Literal["batchmean", "mean"]


@in_full_precision
def cross_entropy_loss(
    student_logits: Tensor,
    labels: Tensor,
    other_labels: Tensor | None = None,
    other_share: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Return the cross-entropy with the labels, averaged over the batch.

    .. math:: L = -\frac1B \sum_b \sum_k y_{bk} \log \sigma(z_b)_k,\quad y = (1 - a)\,\mathrm{onehot} + a / K

    Args:
        student_logits: Unnormalized scores :math:`z`, shape ``[batch, classes]``, floating.
        labels: True classes, shape ``[batch]``, int64, in ``0 .. classes - 1``.
        other_labels: Second classes of mixed images (CutMix), same shape and type; None if there are none.
        other_share: Their share of each label, shape ``[batch]``, in ``[0, 1]``:
            :math:`y = (1 - s)\,\mathrm{onehot}(y_1) + s\,\mathrm{onehot}(y_2)`. Required with ``other_labels`` and
            only then.
        label_smoothing: :math:`a` in ``[0, 1)``, the share of the label spread over all :math:`K` classes.

    Returns:
        A scalar, shape ``[]``, in nats, of the type of the logits (at least float32).

    Raises:
        ValueError: If the shapes do not fit, labels are not int64 or not valid classes, only one of the two ``other``
            tensors is given, or ``other_share`` or ``label_smoothing`` is out of range.

    References:
        Szegedy et al., `Rethinking the Inception Architecture <https://arxiv.org/abs/1512.00567>`_, 2015, section 7.

    Example:
        >>> round(cross_entropy_loss(torch.zeros(2, 4), torch.tensor([0, 3])).item(), 4)  # ln 4
        1.3863
    """
    check_labels(student_logits, labels)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing=}")
    if (other_labels is None) != (other_share is None):
        raise ValueError("other_labels and other_share belong together: give both or neither")
    if other_labels is None or other_share is None:
        return functional.cross_entropy(student_logits, labels, label_smoothing=label_smoothing)
    check_labels(student_logits, other_labels)
    check_share(other_share, labels)
    first, second = (
        functional.cross_entropy(student_logits, of, label_smoothing=label_smoothing, reduction="none")
        for of in (labels, other_labels)
    )
    return torch.lerp(first, second, other_share.to(first.dtype)).mean()


@in_full_precision
def soft_target_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    scale: float | None = None,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Return the soft-target loss of Hinton et al.

    .. math:: L = c\, \mathrm{KL}(\sigma(z_t / \tau) \,\|\, \sigma(z_s / \tau))

    Args:
        student_logits: Unnormalized scores :math:`z_s`, shape ``[batch, classes]``, floating.
        teacher_logits: :math:`z_t`, same shape. Treated as a constant: no gradient flows into it.
        temperature: :math:`\tau > 0`, dimensionless; 1 leaves the distributions unchanged.
        scale: :math:`c \ge 0`; defaults to :math:`\tau^2`, which keeps the gradient's size when :math:`\tau` changes.
            Give 1 for the bare divergence.
        reduction: ``"batchmean"`` divides the sum by the batch, ``"mean"`` by batch times classes (as some published
            code does; it is ``classes`` times smaller).

    Returns:
        A scalar, shape ``[]``, in nats, of the wider type of both logits (at least float32). Zero where both
        are equal.

    Raises:
        ValueError: If the shapes differ or are not two-dimensional, ``temperature`` is not positive and finite,
            ``scale`` is negative or not finite, or ``reduction`` is unknown.

    References:
        Hinton, Vinyals, Dean, `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_,
        2015, section 2.

    Example:
        >>> teacher_logits = torch.tensor([[2.0, 0.0]])
        >>> soft_target_loss(teacher_logits, teacher_logits, temperature=4.0).item()
        0.0
        >>> round(soft_target_loss(torch.zeros(1, 2), teacher_logits, temperature=1.0).item(), 4)
        0.3278
    """
    check_logits(student_logits, teacher_logits)
    check_temperature(temperature, scale)
    if reduction not in ("batchmean", "mean"):
        raise ValueError(f"reduction must be 'batchmean' or 'mean', got {reduction=}")
    student_log = soft_log_probabilities(student_logits, temperature)
    teacher_log = soft_log_probabilities(given(teacher_logits), temperature)
    # "sum" and our own divisor: PyTorch warns that the meaning of "mean" will change
    divergence = functional.kl_div(student_log, teacher_log, reduction="sum", log_target=True)
    count = len(student_logits) if reduction == "batchmean" else student_logits.numel()
    return undoubled(divergence / count * (temperature**2 if scale is None else scale), student_logits, temperature)


@in_full_precision
def logit_square_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Return the mean squared difference of logits over a temperature.

    .. math:: L = \frac{1}{B K} \sum (z_s / \tau - z_t / \tau)^2

    Args:
        student_logits: Unnormalized scores :math:`z_s`, shape ``[batch, classes]``, floating.
        teacher_logits: :math:`z_t`, same shape. Treated as a constant: no gradient flows into it.
        temperature: :math:`\tau > 0`; it scales the loss by :math:`1 / \tau^2`, which nothing else compensates.

    Returns:
        A scalar, shape ``[]``, a mean over batch and classes. Zero where both logits are equal; unlike soft targets it
        changes when a constant is added to an image's logits.

    Raises:
        ValueError: If the shapes differ or are not two-dimensional, or ``temperature`` is not positive and finite.

    References:
        Ba, Caruana, `Do Deep Nets Really Need to be Deep? <https://arxiv.org/abs/1312.6184>`_, 2014, section 2.2 (there
        with a factor of one half); with a temperature as MetaDistil offers it (Zhou, Xu, McAuley 2022).

    Example:
        >>> logit_square_loss(torch.zeros(1, 2), torch.tensor([[4.0, 0.0]]), temperature=2.0).item()
        2.0
    """
    check_logits(student_logits, teacher_logits)
    check_temperature(temperature)
    return functional.mse_loss(student_logits / temperature, given(teacher_logits) / temperature)


@in_full_precision
def decoupled_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    target_weight: float = 1.0,
    others_weight: float = 8.0,
    scale: float | None = None,
) -> Tensor:
    r"""Return soft targets in two parts, each with its own weight: the true class, and the others among themselves.

    .. math:: L = \frac{c}{B} \sum_b \big[ \alpha\, \mathrm{KL}(b_t \| b_s) + \beta\, \mathrm{KL}(r_t \| r_s) \big]

    with :math:`b = (q_y, 1 - q_y)` and :math:`r_k = q_k / (1 - q_y)` for :math:`k \ne y`, where
    :math:`q = \sigma(z / \tau)`. :func:`soft_target_loss` is the case :math:`\alpha = 1,\ \beta = 1 - p_y` for each
    image.

    Args:
        student_logits: Shape ``[batch, classes]``, floating, at least two classes.
        teacher_logits: Same shape. Treated as a constant.
        labels: Shape ``[batch]``, int64.
        temperature: :math:`\tau > 0`.
        target_weight: :math:`\alpha \ge 0`.
        others_weight: :math:`\beta \ge 0`; 8 is published for CIFAR-100.
        scale: :math:`c \ge 0`; defaults to :math:`\tau^2`.

    Returns:
        A scalar, shape ``[]``, in nats. Zero where both logits are equal.

    Raises:
        ValueError: If shapes do not fit, there are fewer than two classes, or a number is out of range.

    References:
        Zhao et al., `Decoupled Knowledge Distillation <https://arxiv.org/abs/2203.08679>`_, 2022, equation 7.

    Example:
        >>> z = torch.tensor([[1.0, 0.0, -1.0]])
        >>> decoupled_loss(z, z, torch.tensor([0]), temperature=4.0).item()
        0.0
    """
    check_logits(student_logits, teacher_logits, least_classes=2)
    check_labels(student_logits, labels)
    check_temperature(temperature, scale)
    check_weight(target_weight=target_weight, others_weight=others_weight)
    student_log = soft_log_probabilities(student_logits, temperature)
    teacher_log = soft_log_probabilities(given(teacher_logits), temperature)
    is_target = functional.one_hot(labels, student_logits.shape[1]).bool()
    target = _binary_divergence(student_log, teacher_log, is_target)
    others = _others_divergence(student_log, teacher_log, is_target)
    total = target_weight * target + others_weight * others
    return undoubled(total / len(labels) * (temperature**2 if scale is None else scale), student_logits, temperature)


def _binary_divergence(student_log: Tensor, teacher_log: Tensor, is_target: Tensor) -> Tensor:
    student, teacher = (
        torch.stack((rows[is_target], log_others(rows, is_target)), 1) for rows in (student_log, teacher_log)
    )
    return functional.kl_div(student, teacher, reduction="sum", log_target=True)


def _others_divergence(student_log: Tensor, teacher_log: Tensor, is_target: Tensor) -> Tensor:
    classes = student_log.shape[1] - 1
    student, teacher = (
        functional.log_softmax(rows[~is_target].reshape(-1, classes), dim=1) for rows in (student_log, teacher_log)
    )
    return functional.kl_div(student, teacher, reduction="sum", log_target=True)
